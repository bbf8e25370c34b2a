// The report's charts, drawn from the data in the page; those of a layer when its row is opened.
const data = JSON.parse(document.getElementById("data").textContent);

const MODES = { float: "float", observe: "observe", weights: "weights quantized", quantize: "quantized", frozen: "frozen" };
for (const panel of data.training.panels) {
  const host = node("figure", document.getElementById("curves"));
  chart(host, {
    title: panel.title, height: panel.small ? 110 : 190,
    x: { label: "step", format: (x) => String(Math.round(x)), name: (x) => `step ${x}`, domain: data.training.steps },
    y: { format: panel.share ? (y) => `${Number((100 * y).toFixed(2))} %` : short },
    bands: data.training.phases.map((p) => ({ from: p.start, to: p.end, kind: p.mode, label: MODES[p.mode] ?? p.mode })),
    rules: data.training.phases.slice(1).map((p) => ({ x: p.start, kind: "faint" })),
    series: panel.lines,
  });
}

const plot = document.getElementById("sensitivity-chart");
if (plot) {
  const s = data.sensitivity, choices = document.getElementById("sensitivity-metric");
  const show = (metric) => {
    plot.replaceChildren();
    for (const button of choices?.children ?? []) button.setAttribute("aria-pressed", String(button.value === metric));
    const share = s.shares.includes(metric), change = (values, base) => values.map((v) => v === null ? null : v - base);
    const format = share
      ? (y) => `${y > 0 ? "+" : ""}${Number((100 * y).toFixed(2))}`.replace("-", "\u2212") : (y) => (y > 0 ? "+" : "") + short(y);
    chart(plot, {
      title: `Change of ${metric}${share ? " in points" : ""} as one layer is quantized, or left in float`, height: 200,
      x: {
        label: "layers, in the order of the network", domain: [-0.5, s.names.length - 0.5], name: (i) => s.names[i],
        ticks: s.names.length > 14 ? undefined : s.names.map((name, i) => [i, name.replace(" (activation)", "")]).map(([i, name]) => [i, name.length > 12 ? `\u2026${name.slice(-11)}` : name]),
        format: (x) => Number.isInteger(x) ? String(x + 1) : "",
      },
      y: { format, zero: true },
      series: [
        { label: "only it quantized, against float", kind: "dots", tone: "var(--qat)", x: s.names.map((_, i) => i),
          y: change(s.only[metric], s.float[metric]) },
        { label: "all but it quantized, against all", kind: "dots", hollow: true, tone: "var(--ptq)",
          x: s.names.map((_, i) => i), y: change(s.all_but[metric], s.quantized[metric]) },
      ],
      pick: (i) => open(s.keys[i], true),
    });
  };
  for (const button of choices?.children ?? []) button.addEventListener("click", () => show(button.value));
  show(s.metrics[0]);
}

function histogram(host, tensor, seen) {
  const h = seen.histogram, wide = (h.high - h.low) / h.counts.length, unit = h.unit === "level" ? "level" : "value";
  const clip = h.clip, outside = clip ? [
    { from: -Infinity, to: clip[0], kind: "outside" }, { from: clip[1], to: Infinity, kind: "outside" },
  ].map((b) => ({ ...b, from: Math.max(b.from, h.low), to: Math.min(b.to, h.high) })) : [];
  chart(host, {
    title: tensor.title, height: 150,
    x: { label: unit === "level" ? "level (value / its own scale)" : "value", domain: [h.low, h.high],
      name: (x) => `${short(x - wide / 2)} to ${short(x + wide / 2)}` },
    y: { format: (y) => String(Math.round(y)) },
    bands: outside, levels: h.levels ?? [],
    rules: clip ? [{ x: clip[0], label: "clip" }, { x: clip[1], label: "clip", anchor: "end" }] : [],
    series: [{ label: "values", kind: "bars", tone: "var(--qat)", width: wide, y: h.counts,
      x: h.counts.map((_, i) => h.low + (i + 0.5) * wide) }],
  });
  const facts = [seen.sqnr_db === null ? null : `SQNR ${seen.sqnr_db.toFixed(1)} dB`];
  if (seen.clipped !== null) facts.push(`${percent(seen.clipped)} clipped`);
  if (seen.levels_used !== null) facts.push(`${seen.levels_used} of ${seen.levels_total} levels used`);
  if (h.below + h.above) facts.push(`${h.below + h.above} of ${h.values} values beyond the picture`);
  node("figcaption", host, { textContent: facts.filter(Boolean).join(" \u00b7 ") });
}

function errors(host, seen) {
  const c = seen.error_curve, x = data.multiples;
  if (!c) {
    node("p", host, { className: "none", textContent: "No range is chosen here: the levels are fitted, or the format has no scale." });
    return;
  }
  const name = (m) => `${short(m)} \u00d7 the range${c.clip === null ? "" : `, clip ${short(m * c.clip)}`}`;
  chart(host, {
    title: "Error over the clip range", height: 150,
    x: { label: "clip range, as a multiple of the chosen one", log: true, name,
      ticks: [[1 / 16, "1/16"], [1 / 8, "1/8"], [1 / 4, "1/4"], [1 / 2, "1/2"], [1, "1"], [2, "2"], [4, "4"]] },
    y: { log: true, format: (y) => `${(10 * Math.log10(y)).toFixed(0).replace("-", "\u2212")} dB` },
    rules: [{ x: 1, label: "chosen" }, { x: c.best_multiple, kind: "faint" }],
    series: [
      { label: "clipping", tone: "var(--bad)", x, y: c.clipping }, { label: "rounding", tone: "var(--ptq)", x, y: c.rounding },
      { label: "both", tone: "var(--ink)", x, y: x.map((_, i) => c.clipping[i] + c.rounding[i]) },
    ].map((s) => ({ ...s, kind: "line", format: (y) => `${(10 * Math.log10(y)).toFixed(1).replace("-", "\u2212")} dB` })),
  });
  const decibels = (y) => `${(10 * Math.log10(y)).toFixed(1).replace("-", "\u2212")} dB`;
  const text = !c.chosen ? "The chosen range has no error." : c.best_multiple === 1
    ? `The chosen range has the smallest error of all, ${decibels(c.chosen)} of the signal.`
    : `Error at the chosen range ${decibels(c.chosen)} of the signal; smallest at ${short(c.best_multiple)} \u00d7, ${decibels(c.best)}.`;
  node("figcaption", host, { textContent: text });
}

function draw(row, key) {
  const entry = data.layers[key], cell = node("td", node("tr", null, { className: "detail" }), { colSpan: row.cells.length });
  const inside = node("div", cell, { className: "inside" }), list = node("dl", inside);
  row.after(cell.parentElement);
  for (const [term, text] of entry.facts) {
    const pair = node("div", list);
    node("dt", pair, { textContent: term });
    node("dd", pair, { textContent: text });
  }
  const panels = node("div", inside, { className: "panels" });
  for (const tensor of entry.tensors) {
    const seen = data.seen[tensor.quantizer];
    if (!seen) { node("p", panels, { className: "none", textContent: `${tensor.title}: the samples did not reach it.` }); continue; }
    histogram(node("figure", panels), tensor, seen);
    errors(node("figure", panels), seen);
  }
  return cell.parentElement;
}

const openers = new Map([...document.querySelectorAll(".opens")].map((button) => [button.dataset.opens, button]));
function open(key, scroll = false) {
  const button = openers.get(key);
  if (!button) return;
  if (button.getAttribute("aria-expanded") === "false") button.click();
  if (scroll) { button.scrollIntoView({ block: "center" }); button.focus({ preventScroll: true }); }
}
for (const [key, button] of openers) {
  let detail = null;
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!shown));
    if (detail === null) detail = draw(button.closest("tr"), key);
    else detail.hidden = shown;
  });
}
