"use strict";
/* The table of rows. Texts of rows reach the page through textContent only, never as markup. */
(async () => {
  const overview = JSON.parse(document.getElementById("overview").textContent);
  const byId = (id) => document.getElementById(id);
  const compare = overview.hasBaseline;
  const metrics = new Map(overview.metrics.map((metric) => [metric.name, metric]));

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  async function unpack() {
    const packed = Uint8Array.from(atob(byId("packed-rows").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  /* Control characters are shown as their pictures, and marks that turn the writing direction as their code. */
  const visible = (text) => text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  let rows;
  try {
    rows = await unpack();
  } catch (error) {
    byId("row-count").textContent = "This browser cannot unpack the rows; they are also in scores.jsonl and in the spreadsheet.";
    return;
  }
  for (const row of rows) {
    for (const key of ["q", "s", "r"]) if (row[key]) row[key] = visible(row[key]);
    for (const answer of [row.c, row.b]) if (answer) for (const key of ["t", "e", "h"]) if (answer[key]) answer[key] = visible(answer[key]);
    row.hay = [row.id, row.q, row.s, row.r, row.c.t, row.c.e, row.c.h, row.b?.t, row.b?.e, row.b?.h].filter(Boolean).join("\n").toLowerCase();
  }

  let metric = overview.leading;
  const score = (row) => row.v[metric] ?? null;
  const before = (row) => row.w[metric] ?? null;
  const change = (row) => (score(row) === null || before(row) === null ? null : score(row) - before(row));
  const gain = (row) => (change(row) === null ? 0 : change(row) * (metrics.get(metric).direction === "lower" ? -1 : 1));
  const number = (value, signed = false, name = metric) => {
    if (value === null || value === undefined) return "–";
    const share = metrics.get(name).share;
    const shown = share ? (100 * value).toFixed(1) : String(Math.round(value * 1000) / 1000);
    return (signed && value > 0 ? `+${shown}` : shown).replace("-", "−");
  };

  const filters = new Map([
    ["all", ["All rows", () => true]],
    ...(compare ? [
      ["worse", ["Worst regressions", (row) => gain(row) < 0]],
      ["better", ["Best gains", (row) => gain(row) > 0]],
      ["changed", ["Answer changed", (row) => row.b !== null && row.b.t !== row.c.t]],
    ] : []),
    ["errors", ["Errors", (row) => Boolean(row.c.e || row.b?.e)]],
    ["cut", ["Cut at the token limit", (row) => Boolean(row.c.cut || row.b?.cut)]],
    ...(rows.some((row) => row.c.lost || row.b?.lost) ? [["lost", ["Cut in thoughts", (row) => Boolean(row.c.lost || row.b?.lost)]]] : []),
    ["unscored", ["Not scored", (row) => score(row) === null || (row.b !== null && before(row) === null)]],
  ]);
  let filter = "all";
  let search = "";

  const columns = [
    { id: "n", label: "Row", accessorFn: (row) => row.n, sortDescFirst: false },
    { id: "question", label: "Question", accessorFn: (row) => row.q, sortDescFirst: false },
    { id: "answer", label: compare ? "Answer after" : "Answer", accessorFn: (row) => row.c.e ?? row.c.t, sortDescFirst: false },
    ...(compare ? [{ id: "before", label: "Before", accessorFn: (row) => before(row) ?? undefined, sortUndefined: "last" }] : []),
    { id: "score", label: compare ? "After" : "Score", accessorFn: (row) => score(row) ?? undefined, sortUndefined: "last" },
    ...(compare ? [{ id: "change", label: "Change", accessorFn: (row) => change(row) ?? undefined, sortUndefined: "last" }] : []),
  ].map((column) => ({ sortingFn: "basic", ...column }));

  let state = { sorting: [], pagination: { pageIndex: 0, pageSize: 25 }, columnFilters: [], columnVisibility: {}, columnOrder: [], columnPinning: { left: [], right: [] }, expanded: {}, grouping: [], rowSelection: {}, globalFilter: undefined };
  const table = TableCore.createTable({
    data: rows, columns, state, renderFallbackValue: null, autoResetPageIndex: false,
    getRowId: (row) => String(row.n),
    onStateChange: () => {},
    getCoreRowModel: TableCore.getCoreRowModel(),
    getSortedRowModel: TableCore.getSortedRowModel(),
    getPaginationRowModel: TableCore.getPaginationRowModel(),
  });
  table.setOptions((options) => ({
    ...options,
    onStateChange: (update) => { state = typeof update === "function" ? update(state) : update; table.setOptions((o) => ({ ...o, state })); render(); },
  }));

  function choose() {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const keep = filters.get(filter)[1];
    const data = rows.filter((row) => keep(row) && words.every((word) => row.hay.includes(word)));
    state = { ...state, pagination: { ...state.pagination, pageIndex: 0 } };
    table.setOptions((options) => ({ ...options, data, state, columns: [...columns] }));
    render();
  }

  const open = new Set();
  const narrow = matchMedia("(max-width: 44rem)");
  narrow.addEventListener("change", () => render());

  function render() {
    const shown = table.getRowModel().rows;
    const count = table.getCoreRowModel().rows.length;
    const all = rows.length;
    byId("row-count").textContent = count === all ? `${all.toLocaleString("en")} rows` : `${count.toLocaleString("en")} of ${all.toLocaleString("en")} rows`;
    const head = make("tr", {}, ...table.getFlatHeaders().map(({ column }) => {
      const sorted = column.getIsSorted();
      const wide = column.id === "answer";
      return make("th", { scope: "col", class: `${columnClass(column.id)}${wide ? " wide" : ""}`, "aria-sort": sorted ? (sorted === "asc" ? "ascending" : "descending") : "none" },
        make("button", { type: "button", "data-sort": column.id, onclick: () => sortBy(column) }, `${column.columnDef.label}${sorted === "asc" ? " ↑" : sorted === "desc" ? " ↓" : ""}`));
    }));
    const body = make("tbody", {}, ...shown.flatMap(({ original }) => rowNodes(original)));
    byId("row-table").replaceChildren(count
      ? make("table", { class: "rows" }, make("caption", { class: "hidden" }, "Rows with their scores"), make("thead", {}, head), body)
      : make("p", { class: "none" }, "No row fits. Change the search or show all rows."));
    byId("pages").hidden = table.getPageCount() < 2 && state.pagination.pageSize === 25;
    byId("page").textContent = `Page ${state.pagination.pageIndex + 1} of ${Math.max(1, table.getPageCount())}`;
    byId("previous").disabled = !table.getCanPreviousPage();
    byId("next").disabled = !table.getCanNextPage();
  }

  function sortBy(column) {
    column.toggleSorting();
    byId("row-table").querySelector(`[data-sort="${column.id}"]`)?.focus();
  }

  const columnClass = (id) => ({ n: "c-n", before: "c-score number wide", score: "c-score number", change: "c-change number" })[id] ?? "";

  function rowNodes(row) {
    const isOpen = open.has(row.n);
    const value = change(row);
    const tone = gain(row) > 0 ? "candidate" : gain(row) < 0 ? "baseline" : "";
    const badges = [row.c.e ? "error" : null, row.c.lost ? "cut in thoughts" : row.c.cut ? "cut" : null].filter(Boolean).map((word) => make("span", { class: "badge" }, word));
    const line = make("tr", { class: `row${isOpen ? " open" : ""}`, "data-row": row.n, onclick: () => { if (!String(getSelection())) toggle(row); } },
      make("td", { class: "c-n" }, make("button", { type: "button", class: "opener", "aria-expanded": String(isOpen), "aria-label": `Row ${row.n}`, onclick: (event) => { event.stopPropagation(); toggle(row); } }, String(row.n))),
      make("td", {}, make("span", { class: "clip", dir: "auto" }, row.q.slice(0, 300))),
      make("td", { class: "wide" }, make("span", { class: "clip", dir: "auto" }, ...badges, (row.c.e ?? row.c.t).slice(0, 300))),
      ...(compare ? [make("td", { class: "c-score number wide" }, number(before(row)))] : []),
      make("td", { class: "c-score number" }, number(score(row))),
      ...(compare ? [make("td", { class: "c-change number" }, make("span", { class: `change ${tone}` }, number(value, true)))] : []));
    return isOpen ? [line, detail(row)] : [line];
  }

  /* Opens or closes one row in place, so that focus and the other rows stay as they are. */
  function toggle(row) {
    const line = byId("row-table").querySelector(`tr[data-row="${row.n}"]`);
    const opens = !open.has(row.n);
    if (opens) { open.add(row.n); line.after(detail(row)); } else { open.delete(row.n); line.nextElementSibling.remove(); }
    line.classList.toggle("open", opens);
    line.querySelector(".opener").setAttribute("aria-expanded", String(opens));
  }

  let marking = compare ? "other" : "reference";

  function detail(row) {
    const choices = [...(compare && row.b ? [["other", "between the answers"]] : []), ...(row.r !== null ? [["reference", "from the reference"]] : []), ["off", "off"]];
    const mode = choices.some(([key]) => key === marking) ? marking : choices[0][0];
    const chooser = make("select", { onchange: (event) => {
      marking = event.target.value;
      const fresh = detail(row);
      event.target.closest("tr.detail").replaceWith(fresh);
      fresh.querySelector("select").focus();
    } },
      ...choices.map(([key, words]) => make("option", { value: key, selected: key === mode }, words)));
    const target = mode === "reference" ? row.r : null;
    const panes = [pane("Question", row.q), row.s ? pane("System prompt", row.s) : null, row.r !== null ? pane("Reference", row.r) : null];
    const answers = [];
    const comparable = row.b && !row.b.e && !row.c.e;
    if (compare) answers.push(row.b ? answerPane("Before", row.b, mode === "other" && comparable ? [row.b.t, row.c.t, "del"] : target !== null ? [target, row.b.t, "ins"] : null) : pane("Before", "", "not in the baseline's run"));
    answers.push(answerPane(compare ? "After" : "Answer", row.c, mode === "other" && comparable ? [row.b.t, row.c.t, "ins"] : target !== null ? [target, row.c.t, "ins"] : null));
    const hidden = narrow.matches ? (compare ? 2 : 1) : 0;
    return make("tr", { class: "detail" }, make("td", { colspan: columns.length - hidden },
      make("div", { class: "panes" }, ...panes), make("div", { class: "panes" }, ...answers),
      make("div", { class: "detail-tools" }, make("label", {}, "Mark differences ", chooser), make("span", { class: "row-id" }, row.id)),
      scoreTable(row)));
  }

  function scoreTable(row) {
    return make("table", { class: "detail-scores" },
      make("thead", {}, make("tr", {}, ...["Metric", ...(compare ? ["Before", "After", "Change"] : ["Score"])].map((title, i) => make("th", { scope: "col", class: i ? "number" : null }, title)))),
      make("tbody", {}, ...overview.metrics.map(({ name, label }) => {
        const [old, now] = [row.w[name] ?? null, row.v[name] ?? null];
        return make("tr", {}, make("th", { scope: "row" }, label),
          ...(compare ? [make("td", { class: "number" }, old === null ? row.x[name] ?? "–" : number(old, false, name))] : []),
          make("td", { class: "number" }, now === null ? row.u[name] ?? "–" : number(now, false, name)),
          ...(compare ? [make("td", { class: "number" }, old === null || now === null ? "–" : number(now - old, true, name))] : []));
      })));
  }

  function pane(title, text, note = null) {
    return make("div", { class: "pane" }, make("h3", {}, title),
      make("div", { class: `text${text ? "" : " empty"}`, dir: "auto", tabindex: "0", role: "region", "aria-label": title }, text || note || "empty"));
  }

  function answerPane(title, answer, difference) {
    const thoughtTokens = answer.i ? `, ${answer.i.toLocaleString("en")} of them thoughts` : "";
    const facts = [answer.k === null ? null : `${answer.k.toLocaleString("en")} tokens${thoughtTokens}`, answer.lost ? "cut in its thoughts" : answer.cut ? "cut at the token limit" : null].filter(Boolean).join(", ");
    const text = make("div", { class: "text", dir: "auto", tabindex: "0", role: "region", "aria-label": title });
    if (answer.e) { text.classList.add("error"); text.textContent = `Error: ${answer.e}`; }
    else if (!answer.t) { text.classList.add("empty"); text.textContent = answer.lost ? "no answer: cut in its thoughts" : "empty"; }
    else mark(text, answer.t, difference);
    return make("div", { class: "pane" }, make("h3", {}, title, make("small", {}, facts)), text, answer.h ? thoughts(title, answer.h) : null);
  }

  function thoughts(title, text) {
    return make("details", { class: "thoughts" }, make("summary", {}, "Thoughts"),
      make("div", { class: "text", dir: "auto", tabindex: "0", role: "region", "aria-label": `${title}, thoughts` }, text));
  }

  /* `difference` is [old text, new text, which side this pane shows as "ins" (new) or "del" (old)]. */
  function mark(node, text, difference) {
    const parts = difference && difference[0] !== difference[1] && Diff.diffWordsWithSpace(difference[0], difference[1], { timeout: 150, maxEditLength: 3000 });
    if (!parts) { node.textContent = text; return; }
    const side = difference[2];
    for (const part of parts) {
      if (side === "ins" ? part.removed : part.added) continue;
      node.append(part.added ? make("ins", {}, part.value) : part.removed ? make("del", {}, part.value) : part.value);
    }
  }

  const filterSelect = byId("filter");
  for (const [key, [words]] of filters) filterSelect.add(new Option(words, key));
  filterSelect.addEventListener("change", () => {
    filter = filterSelect.value;
    const order = { worse: [{ id: "change", desc: metrics.get(metric).direction === "lower" }], better: [{ id: "change", desc: metrics.get(metric).direction !== "lower" }] };
    state = { ...state, sorting: order[filter] ?? [] };
    choose();
  });
  const metricSelect = byId("row-metric");
  for (const [name, { label }] of metrics) metricSelect.add(new Option(label, name));
  metricSelect.addEventListener("change", () => { metric = metricSelect.value; filterSelect.dispatchEvent(new Event("change")); });
  let waiting;
  byId("search").addEventListener("input", (event) => { clearTimeout(waiting); waiting = setTimeout(() => { search = event.target.value; choose(); }, 120); });
  byId("previous").addEventListener("click", () => table.previousPage());
  byId("next").addEventListener("click", () => table.nextPage());
  byId("page-size").addEventListener("change", (event) => table.setPageSize(Number(event.target.value)));

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const active = document.activeElement;
    if (active.matches("input, select, textarea")) {
      if (event.key === "Escape" && active.id === "search") { clearTimeout(waiting); active.value = ""; search = ""; choose(); active.blur(); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); byId("search").focus(); return; }
    if (!byId("rows").contains(active) || active.matches(".text")) return;
    const openers = [...byId("row-table").querySelectorAll(".opener")];
    const line = active.closest("tr.row");
    const at = line ? openers.indexOf(line.querySelector(".opener")) : -1;
    const moves = {
      ArrowDown: () => openers[Math.min(at + 1, openers.length - 1)]?.focus(),
      ArrowUp: () => openers[Math.max(at - 1, 0)]?.focus(),
      ArrowRight: () => { if (table.getCanNextPage()) { table.nextPage(); byId("row-table").querySelector(".opener")?.focus(); } },
      ArrowLeft: () => { if (table.getCanPreviousPage()) { table.previousPage(); byId("row-table").querySelector(".opener")?.focus(); } },
      Escape: () => { if (line && open.has(Number(line.dataset.row))) toggle(rows.find((row) => row.n === Number(line.dataset.row))); },
    };
    if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
  });

  choose();
})();
