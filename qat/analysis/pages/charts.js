// Charts as inline SVG: lines, dots or bars over one x axis, over bands and rules.
// Pointing or arrow keys read values, dragging or + and - zoom, a double click or 0 shows all again, Enter picks.
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 56, right: 10, top: 16, bottom: 36 };

function node(name, parent, properties = {}) {
  const element = Object.assign(document.createElement(name), properties);
  parent?.append(element);
  return element;
}
function shape(name, parent, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}
function short(x) {
  if (x === null || x === undefined) return "\u2013";
  const size = Math.abs(x);
  const text = x === 0 ? "0" : size >= 1e6 || size < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
  return text.replaceAll("-", "\u2212");
}
function percent(x) { return x === null || x === undefined ? "\u2013" : `${(100 * x).toFixed(2)} %`; }

// Round numbers inside [low, high], about `count` of them.
function roundTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}
function decades(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), ticks = [];
  const step = Math.max(1, Math.ceil((last - first + 1) / count));
  for (let i = first; i <= last; i += step) ticks.push(10 ** i);
  return ticks.length > 1 ? ticks : [low, high];
}

function chart(host, spec) {
  host.classList.add("chart");
  const bars = spec.series.some((s) => s.kind === "bars");
  const top = node("div", host, { className: "top" });
  if (spec.title) node("h4", top, { textContent: spec.title });
  const legend = node("span", top, { className: "legend" });
  if (spec.series.length > 1) {
    for (const s of spec.series) node("span", legend, { textContent: s.label }).style.setProperty("--tone", s.tone);
  }
  const tools = node("span", top, { className: "tools" });
  const reset = node("button", tools, { type: "button", className: "quiet", textContent: "Show all", hidden: true });
  let logarithmic = Boolean(spec.y.log);
  if (bars) {
    const button = node("button", tools, { type: "button", className: "quiet", textContent: "log" });
    button.setAttribute("aria-pressed", "false");
    button.title = "Counts on a logarithmic axis";
    button.addEventListener("click", () => {
      logarithmic = !logarithmic;
      button.setAttribute("aria-pressed", String(logarithmic));
      draw();
    });
  }
  const svg = shape("svg", host, { tabindex: 0, role: "group" });
  svg.setAttribute("aria-label", `${spec.title ?? spec.label}. Arrow keys read values, plus and minus zoom, 0 shows all.`);
  const tip = node("div", host, { className: "tip", hidden: true });
  tip.setAttribute("role", "status");

  const forward = spec.x.log ? Math.log2 : (v) => v, backward = spec.x.log ? (v) => 2 ** v : (v) => v;
  const xs = [...new Set(spec.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const whole = (spec.x.domain ?? [xs[0], xs.at(-1)]).map(forward);
  if (whole[0] === whole[1]) { whole[0] -= 0.5; whole[1] += 0.5; }
  let view = whole, width = 0, cursor = null, dragging = null, px, py;
  const height = spec.height ?? 190, floor = MARGIN.top + height, textOf = (s, y) => (s.format ?? spec.y.format ?? short)(y);

  const seen = (s, i) => s.y[i] !== null && forward(s.x[i]) >= view[0] - 1e-9 && forward(s.x[i]) <= view[1] + 1e-9;

  // One bin that dwarfs the others (the zeros behind a ReLU) is cut off, and says how many it holds.
  const counts = bars ? [...spec.series[0].y].sort((a, b) => b - a) : [];
  const cutAt = bars && counts[0] > 4 * counts[1] && counts[1] > 0 ? 1.3 * counts[1] : Infinity;

  function yRange() {
    let values = spec.series.flatMap((s) => s.y.filter((y, i) => seen(s, i) && (!logarithmic || y > 0)));
    if (!values.length) values = [1];
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (logarithmic) return bars ? [0.5, Math.max(high, 1) * 1.3] : [Math.max(low, high * 1e-6) / 1.6, high * 1.6];
    if (bars) return [0, high > cutAt ? cutAt : high * 1.06 || 1];
    if (spec.y.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
    const room = (high - low || Math.abs(high) || 1) * 0.08;
    return [low - (low === 0 ? 0 : room), high + room];
  }

  function draw(fixed) {
    width = fixed ?? Math.max(host.clientWidth, 240);
    const inner = width - MARGIN.left - MARGIN.right, range = yRange();
    const ty = logarithmic ? Math.log10 : (v) => v, [y0, y1] = range.map(ty);
    px = (x) => MARGIN.left + (forward(x) - view[0]) / (view[1] - view[0]) * inner;
    py = (y) => floor - (Math.max(ty(Math.max(y, logarithmic ? 1e-30 : -Infinity)), y0) - y0) / (y1 - y0) * height;
    svg.setAttribute("viewBox", `0 0 ${width} ${floor + MARGIN.bottom}`);
    svg.replaceChildren();
    const clip = `clip-${chart.count = (chart.count ?? 0) + 1}`;
    const cut = shape("clipPath", svg, { id: clip });
    shape("rect", cut, { x: MARGIN.left, y: 0, width: inner, height: floor + 8 });
    const under = shape("g", svg, { "clip-path": `url(#${clip})` });
    for (const band of spec.bands ?? []) {
      const a = px(Math.max(band.from, backward(view[0]))), b = px(Math.min(band.to, backward(view[1])));
      if (!(b > a)) continue;
      shape("rect", under, { x: a, y: MARGIN.top, width: b - a, height, class: `band ${band.kind ?? ""}` });
      if (band.label && b - a > 6 * band.label.length + 4) {
        shape("text", svg, { x: (a + b) / 2, y: MARGIN.top - 5, class: "label", "text-anchor": "middle" }, band.label);
      }
    }
    for (const y of logarithmic ? decades(...range, 5) : roundTicks(...range, 4)) {
      shape("line", svg, { x1: MARGIN.left, x2: width - MARGIN.right, y1: py(y), y2: py(y), class: "grid" });
      shape("text", svg, { x: MARGIN.left - 7, y: py(y) + 3.5, "text-anchor": "end" }, (spec.y.format ?? short)(y));
    }
    const shown = view.map(backward);
    const ticks = spec.x.ticks ?? roundTicks(...shown, inner / 95).map((x) => [x, (spec.x.format ?? short)(x)]);
    for (const [x, text] of ticks) {
      if (x < shown[0] - 1e-12 || x > shown[1] + 1e-12) continue;
      shape("line", svg, { x1: px(x), x2: px(x), y1: floor, y2: floor + 4, class: "axis" });
      shape("text", svg, { x: px(x), y: floor + 16, "text-anchor": "middle" }, text);
    }
    shape("line", svg, { x1: MARGIN.left, x2: width - MARGIN.right, y1: floor, y2: floor, class: "axis" });
    shape("text", svg, { x: width - MARGIN.right, y: floor + 31, "text-anchor": "end", class: "label" }, spec.x.label);
    const plot = shape("g", svg, { "clip-path": `url(#${clip})` });
    for (const s of spec.series) drawSeries(plot, s, inner);
    for (const x of spec.levels ?? []) {
      shape("line", plot, { x1: px(x), x2: px(x), y1: floor, y2: floor + 6, class: "level" });
    }
    for (const rule of spec.rules ?? []) {
      if (rule.x < shown[0] || rule.x > shown[1]) continue;
      shape("line", plot, { x1: px(rule.x), x2: px(rule.x), y1: MARGIN.top, y2: floor, class: `rule ${rule.kind ?? ""}` });
      if (!rule.label) continue;
      const right = px(rule.x) > width - 60, anchor = rule.anchor ?? (right ? "end" : "start");
      const shift = anchor === "end" ? -4 : 4;
      shape("text", svg, { x: px(rule.x) + shift, y: MARGIN.top + 9, class: "label", "text-anchor": anchor }, rule.label);
    }
    shape("g", svg, { class: "cursor" });
    reset.hidden = view === whole;
    if (cursor !== null) point(cursor);
  }

  function drawSeries(plot, s, inner) {
    if (s.kind === "bars") {
      const wide = s.width * inner / (view[1] - view[0]);
      s.x.forEach((x, i) => s.y[i] && shape("rect", plot, {
        x: px(x) - wide / 2, width: Math.max(wide - (wide > 4 ? 1 : 0), 0.5), y: Math.max(py(s.y[i]), MARGIN.top),
        height: floor - Math.max(py(s.y[i]), MARGIN.top), fill: s.tone,
      }));
      s.x.forEach((x, i) => !logarithmic && s.y[i] > cutAt && shape("text", plot, {
        x: px(x) + wide / 2 + 5, y: MARGIN.top + 22, class: "label",
      }, `\u2191 ${s.y[i]}`));
      return;
    }
    if (s.kind !== "dots") {
      let path = "", pen = "M";
      s.x.forEach((x, i) => {
        if (s.y[i] === null || (logarithmic && s.y[i] <= 0)) { pen = "M"; return; }
        path += `${pen}${px(x).toFixed(1)} ${py(s.y[i]).toFixed(1)}`;
        pen = "L";
      });
      shape("path", plot, { d: path, stroke: s.tone, class: s.kind ?? "line" });
    }
    if (s.kind === "dots" || s.x.length <= 30) {
      s.x.forEach((x, i) => seen(s, i) && (!logarithmic || s.y[i] > 0) && shape("circle", plot, {
        cx: px(x), cy: py(s.y[i]), r: s.kind === "dots" ? 3.5 : 2, fill: s.hollow ? "var(--page)" : s.tone, stroke: s.tone,
      }));
    }
  }

  function point(at) {
    cursor = at;
    const group = svg.querySelector(".cursor"), x = xs[at];
    group.replaceChildren();
    tip.replaceChildren();
    if (at === null || px(x) < MARGIN.left - 1 || px(x) > width - MARGIN.right + 1) { tip.hidden = true; return; }
    shape("line", group, { x1: px(x), x2: px(x), y1: MARGIN.top, y2: floor });
    node("strong", tip, { textContent: spec.x.name ? spec.x.name(x) : `${spec.x.label} ${(spec.x.format ?? short)(x)}` });
    for (const s of spec.series) {
      const i = s.x.indexOf(x);
      if (i < 0 || s.y[i] === null) continue;
      if (s.kind !== "bars") shape("circle", group, { cx: px(x), cy: py(s.y[i]), r: 4, fill: s.tone });
      node("span", tip, { textContent: `${s.label} ${textOf(s, s.y[i])}` }).style.setProperty("--tone", s.tone);
    }
    tip.hidden = false;
    const left = px(x) / width * host.clientWidth, room = tip.offsetWidth + 14;
    tip.style.left = `${left + room > host.clientWidth ? Math.max(left - room, 0) : left + 12}px`;
    tip.style.top = `${svg.offsetTop + MARGIN.top + 4}px`;
  }

  function zoomTo(a, b) {
    const least = (whole[1] - whole[0]) / 500;
    a = Math.max(a, whole[0]); b = Math.min(b, whole[1]);
    view = b - a >= (whole[1] - whole[0]) * 0.999 ? whole : b - a < least ? view : [a, b];
    draw();
  }
  function zoomBy(factor) {
    const middle = cursor === null ? (view[0] + view[1]) / 2 : forward(xs[cursor]);
    const low = middle - (middle - view[0]) * factor;
    zoomTo(low, low + (view[1] - view[0]) * factor);
  }
  const at = (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    return view[0] + (x - MARGIN.left) / (width - MARGIN.left - MARGIN.right) * (view[1] - view[0]);
  };
  const nearest = (v) => xs.reduce((best, x, i) => Math.abs(forward(x) - v) < Math.abs(forward(xs[best]) - v) ? i : best, 0);

  svg.addEventListener("pointerdown", (event) => { if (event.button === 0) dragging = at(event); });
  svg.addEventListener("pointermove", (event) => {
    point(nearest(at(event)));
    if (dragging === null || !(event.buttons & 1)) return;
    const [a, b] = [dragging, at(event)].sort((m, n) => m - n).map((v) => px(backward(v)));
    shape("rect", svg.querySelector(".cursor"), { x: a, y: MARGIN.top, width: b - a, height, class: "chosen" });
  });
  svg.addEventListener("pointerup", (event) => {
    const [a, b] = [dragging ?? at(event), at(event)].sort((m, n) => m - n);
    dragging = null;
    if (Math.abs(px(backward(b)) - px(backward(a))) > 6) zoomTo(a, b);
    else if (spec.pick) spec.pick(xs[nearest(a)]);
  });
  svg.addEventListener("pointerleave", () => { dragging = null; if (document.activeElement !== svg) point(null); });
  svg.addEventListener("dblclick", () => { view = whole; draw(); });
  svg.addEventListener("blur", () => point(null));
  reset.addEventListener("click", () => { view = whole; draw(); svg.focus(); });
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in steps) point(Math.min(Math.max((cursor ?? (steps[event.key] > 0 ? -1 : xs.length)) + steps[event.key], 0), xs.length - 1));
    else if (event.key === "+" || event.key === "=") zoomBy(0.6);
    else if (event.key === "-") zoomBy(1 / 0.6);
    else if (event.key === "0" || event.key === "Escape") { view = whole; draw(); }
    else if (event.key === "Enter" && spec.pick && cursor !== null) spec.pick(xs[cursor]);
    else return;
    event.preventDefault();
  });
  // Paper has its own width, and no event tells of it.
  addEventListener("beforeprint", () => draw(host.closest(".panels") ? 340 : 690));
  addEventListener("afterprint", () => draw());
  new ResizeObserver(() => { if (host.clientWidth && Math.max(host.clientWidth, 240) !== width) draw(); }).observe(host);
  draw();
}
