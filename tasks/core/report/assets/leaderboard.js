"use strict";
/* One sortable table for each set of rows. Names reach the page through textContent only, never as markup. */
(() => {
  const SHOWN_METRICS = 3;
  const FIRST_RUNS = 100;
  const groups = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  function make(tag, attributes = {}, ...children) {
    const node = document.createElementNS(tag === "svg" || tag === "line" || tag === "circle" ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  const number = (value, share) => {
    if (value === null || value === undefined) return "–";
    return (share ? (100 * value).toFixed(1) : value.toLocaleString("en", { maximumSignificantDigits: 4 })).replace("-", "−");
  };
  const when = (text) => { const moment = new Date(text); return isNaN(moment) ? text : moment.toISOString().slice(0, 16).replace("T", " "); };

  function whisker(metric, [value, low, high]) {
    if (!metric.share || value === null) return null;
    const at = (x) => `${(100 * x).toFixed(2)}%`;
    return make("svg", { class: "whiskers small", height: 10, width: "100%", "aria-hidden": "true" },
      make("line", { class: "rule", x1: 0, x2: "100%", y1: 5, y2: 5 }),
      low === null ? null : make("line", { class: "candidate", x1: at(low), x2: at(high), y1: 5, y2: 5 }),
      make("circle", { class: "candidate", cx: at(value), cy: 5, r: 3.5 }));
  }

  function scoreCell(metric, run) {
    const found = run.scores[metric.name];
    if (!found || found[0] === null) return ["–"];
    const [value, low, high] = found;
    const interval = low === null ? null : make("span", { class: "interval" }, `${number(low, metric.share)} to ${number(high, metric.share)}`);
    return [make("span", { class: "strong" }, number(value, metric.share)), interval, whisker(metric, found)];
  }

  const nameCell = (run) => [
    run.href ? make("a", { href: run.href }, run.name) : run.name,
    run.promoted ? make("span", { class: "badge promoted" }, "promoted") : null,
  ];
  const modelCell = (run) => [
    make("span", { title: run.modelId }, run.model),
    run.settings.length ? make("span", { class: "description" }, run.settings.join(", ")) : null,
  ];

  function columnsOf(group) {
    const missingLast = { sortUndefined: "last" };
    return [
      { id: "name", label: "Run", accessorFn: (run) => run.name, sortDescFirst: false, cell: nameCell, head: true },
      { id: "model", label: "Model", accessorFn: (run) => run.model, sortDescFirst: false, cell: modelCell },
      ...group.metrics.map((metric) => ({
        id: `metric:${metric.name}`, label: metric.label, title: `${metric.description}${metric.direction === "lower" ? " Lower is better." : ""}`,
        accessorFn: (run) => run.scores[metric.name]?.[0] ?? undefined, sortDescFirst: metric.direction !== "lower",
        cell: (run) => scoreCell(metric, run), kind: "number score", ...missingLast,
      })),
      { id: "verdict", label: "Verdict", accessorFn: (run) => run.verdict ?? undefined, sortDescFirst: false, cell: (run) => [run.verdict ? make("span", { class: `pill ${run.verdict}` }, run.verdict) : "–"], ...missingLast },
      { id: "speed", label: "Tokens/s", accessorFn: (run) => run.speed ?? undefined, cell: (run) => [run.speed === null ? "–" : Math.round(run.speed).toLocaleString("en")], kind: "number", ...missingLast },
      { id: "memory", label: "Peak memory", accessorFn: (run) => run.memory ?? undefined, sortDescFirst: false, cell: (run) => [run.memory ? `${(run.memory / 1e9).toFixed(2)} GB` : "–"], kind: "number", ...missingLast },
      { id: "errors", label: "Errors", accessorFn: (run) => run.errors, cell: (run) => [run.errors.toLocaleString("en")], kind: "number" },
      { id: "finished", label: "Finished (UTC)", accessorFn: (run) => run.finished, cell: (run) => [when(run.finished)], kind: "number" },
    ].map((column) => ({ sortingFn: "basic", ...column }));
  }

  let search = "";
  let verdict = "all";
  const verdicts = new Map([
    ["all", ["All", () => true]], ["promoted", ["Promoted now", (run) => run.promoted]],
    ...["promote", "inconclusive", "reject"].map((word) => [word, [word[0].toUpperCase() + word.slice(1), (run) => run.verdict === word]]),
    ["none", ["None yet", (run) => run.verdict === null]],
  ]);
  const fits = (run) => {
    const hay = [run.name, run.modelId, ...run.settings].join("\n").toLowerCase();
    return verdicts.get(verdict)[1](run) && search.toLowerCase().split(/\s+/).every((word) => hay.includes(word));
  };

  function board(group, section) {
    const columns = columnsOf(group);
    const holder = section.querySelector(".board-holder");
    const shown = new Set(group.metrics.slice(0, SHOWN_METRICS).map((metric) => metric.name));
    const visibility = () => Object.fromEntries(group.metrics.map((metric) => [`metric:${metric.name}`, shown.has(metric.name)]));
    const first = group.metrics[0];
    let all = false;
    let state = {
      sorting: first && first.direction !== "none" ? [{ id: `metric:${first.name}`, desc: first.direction !== "lower" }] : [{ id: "finished", desc: true }],
      columnFilters: [], columnVisibility: visibility(), columnOrder: [], columnPinning: { left: [], right: [] },
      pagination: { pageIndex: 0, pageSize: 100 }, expanded: {}, grouping: [], rowSelection: {}, globalFilter: undefined,
    };
    const table = TableCore.createTable({
      data: group.runs, columns, state, renderFallbackValue: null, getRowId: (run) => run.name,
      onStateChange: (update) => { state = typeof update === "function" ? update(state) : update; table.setOptions((options) => ({ ...options, state })); render(); },
      getCoreRowModel: TableCore.getCoreRowModel(), getSortedRowModel: TableCore.getSortedRowModel(),
    });

    function heading({ column }) {
      const sorted = column.getIsSorted();
      const { label, title, kind } = column.columnDef;
      const mark = sorted === "asc" ? " ↑" : sorted === "desc" ? " ↓" : "";
      const sort = () => { column.toggleSorting(); holder.querySelector(`[data-sort="${CSS.escape(column.id)}"]`)?.focus(); };
      return make("th", { scope: "col", class: kind, title, "aria-sort": sorted ? (sorted === "asc" ? "ascending" : "descending") : "none" },
        make("button", { type: "button", "data-sort": column.id, onclick: sort }, `${label}${mark}`));
    }

    function line({ original: run }) {
      return make("tr", { class: `run${run.promoted ? " in-use" : ""}` }, ...table.getVisibleLeafColumns().map(({ columnDef }) =>
        make(columnDef.head ? "th" : "td", { class: columnDef.kind, scope: columnDef.head ? "row" : null, "data-title": columnDef.head ? null : columnDef.label }, ...columnDef.cell(run).filter((part) => part !== null))));
    }

    function render() {
      const rows = table.getRowModel().rows;
      const visible = all ? rows : rows.slice(0, FIRST_RUNS);
      const rest = rows.length - visible.length;
      section.hidden = rows.length === 0;
      holder.replaceChildren(
        make("table", { class: "board" }, make("thead", {}, make("tr", {}, ...table.getFlatHeaders().filter(({ column }) => column.getIsVisible()).map(heading))), make("tbody", {}, ...visible.map(line))),
        ...(rest > 0 ? [make("button", { type: "button", class: "more", onclick: () => { all = true; render(); } }, `Show ${rest.toLocaleString("en")} more`)] : []));
    }

    const choices = section.querySelector(".choices");
    for (const metric of choices ? group.metrics : []) {
      const box = make("input", { type: "checkbox", checked: shown.has(metric.name), onchange: () => { if (box.checked) shown.add(metric.name); else shown.delete(metric.name); table.setColumnVisibility(visibility()); } });
      choices.append(make("label", {}, box, ` ${metric.label}`));
    }
    return () => {
      const data = group.runs.filter(fits);
      table.setOptions((options) => ({ ...options, data, state }));
      render();
      return data.length;
    };
  }

  const boards = groups.map((group, i) => board(group, document.querySelectorAll("section.group")[i]));
  const total = groups.reduce((sum, group) => sum + group.runs.length, 0);
  function choose() {
    const count = boards.reduce((sum, update) => sum + update(), 0);
    byId("run-count").textContent = count === total ? `${total.toLocaleString("en")} runs` : `${count.toLocaleString("en")} of ${total.toLocaleString("en")} runs`;
  }

  for (const [key, [words]] of verdicts) byId("verdict").add(new Option(words, key));
  byId("verdict").addEventListener("change", (event) => { verdict = event.target.value; choose(); });
  byId("search").addEventListener("input", (event) => { search = event.target.value.trim(); choose(); });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !document.activeElement.matches("input, select")) { event.preventDefault(); byId("search").focus(); }
  });
  choose();
})();
