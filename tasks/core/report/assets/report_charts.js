"use strict";
/* Charts: distributions of row scores, change per row, loss curve. */
(() => {
  const overview = JSON.parse(document.getElementById("overview").textContent);
  const byId = (id) => document.getElementById(id);
  const scale = (metric) => (metric.share ? 100 : 1);

  function bins(counts, low, high, factor) {
    const width = (high - low) / counts.length;
    return counts.map((count, i) => ({ count, from: factor * (low + i * width), to: factor * (low + (i + 1) * width) }));
  }

  function draw(holder, options) {
    const width = Math.max(260, holder.clientWidth || 260);
    holder.replaceChildren(Plot.plot({ width, height: 240, marginLeft: 46, marginBottom: 40, style: { background: "none", fontSize: "12px" }, ...options }));
  }

  function legend(holder, entries = [["baseline", "before"], ["candidate", "after"]]) {
    const line = document.createElement("div");
    line.className = "legend";
    for (const [kind, words] of entries) {
      const item = document.createElement("span");
      const key = document.createElement("span");
      key.className = `key ${kind}`;
      item.append(key, ` ${words}`);
      line.append(item);
    }
    holder.prepend(line);
  }

  const outcomeWords = (metric) => (metric.direction === "higher" ? ["right", "wrong"] : ["yes", "no"]);
  const inset = { insetLeft: 0.5, insetRight: 0.5 };
  const rowsAxis = { label: "rows", grid: true, tickFormat: "~s", ticks: 5 };
  // A number every 60 pixels at most: on a phone the long words beside the bars leave little room.
  const countAxis = (holder, margins) => {
    const ticks = Math.min(5, Math.max(1, Math.floor((holder.clientWidth - margins) / 60)));
    return { label: "rows", grid: true, ticks };
  };
  const tip = (d) => `${format(d.from)} to ${format(d.to)}: ${d.count.toLocaleString("en")} rows`;
  const format = (value) => String(Math.round(value * 100) / 100).replace("-", "−");

  function drawScores(metric) {
    const holder = byId("chart-scores");
    const [low, high] = metric.range;
    const factor = scale(metric);
    const before = metric.baseline ? bins(metric.baseline, low, high, factor) : [];
    const after = bins(metric.candidate, low, high, factor);
    if (metric.kind === "binary") {
      const [yes, no] = outcomeWords(metric);
      const ends = (counts, run) => [{ run, value: no, count: counts[0] }, { run, value: yes, count: counts.at(-1) }];
      const data = [...(metric.baseline ? ends(metric.baseline, "before") : []), ...ends(metric.candidate, "after")];
      draw(holder, {
        x: countAxis(holder, 104), fy: { label: null, domain: [yes, no] },
        y: { label: null, axis: null, domain: metric.baseline ? ["before", "after"] : ["after"] },
        marginLeft: 60,
        marks: [
          Plot.barX(data, { x: "count", y: "run", fy: "value", insetTop: 1, insetBottom: 1, fill: (d) => (d.run === "after" ? "var(--candidate)" : "var(--baseline)") }),
          Plot.text(data, { x: "count", y: "run", fy: "value", text: (d) => d.count.toLocaleString("en"), textAnchor: "start", dx: 5 }),
          Plot.ruleX([0]),
        ],
        marginRight: 44,
      });
      if (metric.baseline) legend(holder);
      return;
    }
    const outline = before.flatMap((bin) => [{ at: bin.from, count: bin.count }, { at: bin.to, count: bin.count }]);
    draw(holder, {
      x: { label: metric.label }, y: rowsAxis,
      marks: [
        Plot.rectY(after, { x1: "from", x2: "to", y: "count", fill: "var(--candidate)", fillOpacity: 0.75, ...inset, title: tip, tip: true }),
        Plot.line(outline, { x: "at", y: "count", stroke: "var(--baseline)", strokeWidth: 2 }),
        Plot.ruleY([0]),
      ],
    });
    if (metric.baseline) legend(holder);
  }

  function drawChange(metric) {
    const holder = byId("chart-change");
    if (!holder) return;
    const factor = scale(metric);
    const good = (from, to) => (metric.direction === "none" ? 0 : Math.sign(from + to) * (metric.direction === "lower" ? -1 : 1));
    const colour = (sign) => (sign > 0 ? "var(--good)" : sign < 0 ? "var(--bad)" : "var(--baseline)");
    if (metric.outcomes) {
      const { both, gained, lost, neither } = metric.outcomes;
      const [yes] = outcomeWords(metric);
      const way = metric.direction === "none" ? 0 : metric.direction === "lower" ? -1 : 1;
      const data = [[`${yes} before and after`, both, 0], [`${yes} only after`, gained, way], [`${yes} only before`, lost, -way], [`never ${yes}`, neither, 0]]
        .map(([name, count, sign]) => ({ name, count, sign }));
      draw(holder, {
        marginLeft: 150, marginRight: 44, x: countAxis(holder, 194), y: { label: null, domain: data.map((d) => d.name) },
        marks: [
          Plot.barX(data, { x: "count", y: "name", fill: (d) => colour(d.sign), insetTop: 4, insetBottom: 4 }),
          Plot.text(data, { x: "count", y: "name", text: (d) => d.count.toLocaleString("en"), textAnchor: "start", dx: 5 }),
          Plot.ruleX([0]),
        ],
      });
      return;
    }
    const data = bins(metric.change, -metric.reach, metric.reach, factor);
    draw(holder, {
      x: { label: `change of ${metric.label}` }, y: rowsAxis,
      marks: [
        Plot.rectY(data, { x1: "from", x2: "to", y: "count", fill: (d) => colour(good(d.from, d.to)), fillOpacity: 0.8, ...inset, title: tip, tip: true }),
        Plot.ruleX([0], { strokeOpacity: 0.4 }), Plot.ruleY([0]),
      ],
    });
  }

  function drawLoss() {
    const holder = byId("chart-loss");
    if (!holder) return;
    const points = overview.losses.flatMap((p) => [
      ...(p.loss == null ? [] : [{ step: p.step, value: p.loss, kind: "training" }]),
      ...(p.validation_loss == null ? [] : [{ step: p.step, value: p.validation_loss, kind: "validation" }]),
    ]);
    const kinds = [...new Set(points.map((p) => p.kind))];
    draw(holder, {
      height: 250, x: { label: "step" }, y: { label: "loss", grid: true, zero: true, ticks: 5 },
      color: { domain: ["training", "validation"], range: ["var(--candidate)", "var(--warm)"] },
      marks: [
        Plot.line(points, { x: "step", y: "value", stroke: "kind", strokeWidth: 2 }),
        ...(points.length < 60 ? [Plot.dot(points, { x: "step", y: "value", fill: "kind", r: 2.5 })] : []),
        Plot.tip(points, Plot.pointerX({ x: "step", y: "value", title: (d) => `step ${d.step}: ${d.value.toFixed(4)} (${d.kind})` })),
        Plot.ruleY([0]),
      ],
    });
    if (kinds.length > 1) legend(holder, [["candidate", "training"], ["validation", "validation"]]);
  }

  const select = byId("chart-metric");
  for (const metric of overview.metrics) select.add(new Option(metric.label, metric.name));
  function drawAll() {
    const metric = overview.metrics.find((m) => m.name === select.value);
    drawScores(metric);
    drawChange(metric);
    drawLoss();
  }
  select.addEventListener("change", drawAll);
  let pending;
  new ResizeObserver(() => { cancelAnimationFrame(pending); pending = requestAnimationFrame(drawAll); }).observe(document.body);
})();
