/* Charts: lines over layers or cache sizes, and rows of points for domains, with their noise. */
const MARKS = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x} ${y - r * 1.2}l${r * 1.15} ${r * 2}h${-2.3 * r}z`,
  (x, y, r) => `M${x} ${y - 1.3 * r}l${1.3 * r} ${1.3 * r}l${-1.3 * r} ${1.3 * r}l${-1.3 * r} ${-1.3 * r}z`,
];

function mark(series, x, y, r = 4.2) {
  if (series.look === "tick") return make("rect", { class: "mark", x: x - 1.5, y: y - 7, width: 3, height: 14 });
  return make("path", { class: "mark", d: MARKS[(series.colour ?? 4) % MARKS.length](x, y, r) });
}

/* Round numbers from 0 up to at most `most`. */
function ticks(most, count) {
  const rough = most / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= 0.8 * rough);
  return Array.from({ length: Math.floor(most / size + 1e-9) + 1 }, (_, index) => index * size);
}

function form(chart, value) {
  return chart.percent ? `${+(100 * value).toFixed(1)} %` : `${+value.toFixed(3)}`;
}

/* Colour 4 is nobody's. */
function colour(series) { return `s${series.colour ?? 4}`; }

/* Both ends of the interval at a place, at least 0; nothing where there is none. */
function ends(series, index) {
  const [low, high] = series.interval?.[index] ?? [null, null];
  return low === null || high === null ? null : [Math.max(0, low), high];
}

function highest(chart) {
  const all = chart.series.flatMap((one) => [...one.y, ...(one.interval ?? []).map((ends) => ends[1])]);
  const high = Math.max(...all.filter((value) => value !== null), 0) || 1;
  return chart.percent && high > 0.94 && high <= 1 ? 1 : high * 1.05;
}

function legend(chart) {
  return make("ul", { class: "legend" }, ...chart.series.map((one) => {
    const svg = make("svg", { class: colour(one), viewBox: "0 0 26 14", "aria-hidden": "true" });
    if (one.look === "band") svg.append(make("rect", { class: "band", y: 2, width: 26, height: 10 }));
    if (["line", "dashed", "dotted"].includes(one.look) || one.line)
      svg.append(make("path", { class: `stroke ${one.look}`, d: "M0 7h26" }));
    if (["dot", "tick"].includes(one.look)) svg.append(mark(one, 13, 7));
    return make("li", {}, svg, one.name);
  }));
}

function lines(chart, width) {
  const left = 46, right = 12, bottom = 240, height = bottom + 40, count = chart.x.length;
  const most = highest(chart), levels = ticks(most, 5);
  const inner = width - left - right;
  const x = (index) => left + (count === 1 ? inner / 2 : chart.dense
    ? (index / (count - 1)) * inner : ((index + 0.5) / count) * inner);
  const y = (value) => bottom - (value / most) * (bottom - 12);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const level of levels)
    svg.append(
      make("line", { class: level ? "grid" : "zero", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
      make("text", { x: left - 7, y: y(level) + 4, "text-anchor": "end" }, form(chart, level)),
    );
  const every = Math.ceil(count / Math.max(1, Math.floor(inner / 34)));
  for (let index = 0; index < count; index += every)
    svg.append(make("text", { x: x(index), y: bottom + 18, "text-anchor": "middle" }, `${chart.x[index]}`));
  svg.append(make("text", { x: left + inner / 2, y: bottom + 36, "text-anchor": "middle" }, chart.x_name));
  chart.series.forEach((one, place) => {
    const group = make("g", { class: colour(one) });
    const shift = one.look === "dot" && !one.line ? (place - (chart.series.length - 1) / 2) * Math.min(5, inner / count / 8) : 0;
    const points = one.y.map((value, index) => (value === null ? null : [x(index) + shift, y(value)]));
    const there = one.y.flatMap((_, index) => {
      const at = ends(one, index);
      return at ? [[x(index) + shift, y(at[0]), y(at[1])]] : [];
    });
    const reach = count === 1 ? 30 : 0;
    if ((one.look === "band" || one.line) && there.length)
      group.append(make("path", { class: "band", d: `M${there.map((p) => `${p[0] - reach} ${p[2]}`).join("L")}L${
        there.toReversed().map((p) => `${p[0] + reach} ${p[1]}`).join("L")}z` }));
    if (["line", "dashed", "dotted"].includes(one.look) || one.line)
      group.append(make("path", { class: `stroke ${one.look}`, d: `M${points.filter((p) => p).map((p) => p.join(" ")).join("L")}` }));
    if (one.look === "dot") {
      if (!one.line) for (const end of there) group.append(make("line", { class: "whisker", x1: end[0], x2: end[0], y1: end[1], y2: end[2] }));
      const some = chart.dense ? Math.ceil(points.length / 24) : 1;
      points.forEach((p, index) => { if (p && index % some === 0) group.append(mark(one, ...p)); });
    }
    svg.append(group);
  });
  return svg;
}

function rows(chart, width) {
  const names = chart.x, longest = Math.max(...names.map((name) => [...name].length));
  const left = Math.min(longest * 7 + 10, width * 0.32), right = 14, row = 24;
  const bottom = names.length * row, inner = width - left - right;
  const most = highest(chart), levels = ticks(most, Math.max(2, Math.floor(inner / 60)));
  const x = (value) => left + (value / most) * inner;
  const svg = make("svg", { viewBox: `0 0 ${width} ${bottom + 40}`, "aria-hidden": "true" });
  for (const level of levels)
    svg.append(
      make("line", { class: level ? "grid" : "zero", x1: x(level), x2: x(level), y1: 0, y2: bottom }),
      make("text", { x: x(level), y: bottom + 16, "text-anchor": "middle" }, form(chart, level)),
    );
  svg.append(make("text", { x: left + inner / 2, y: bottom + 34, "text-anchor": "middle" }, chart.y_name));
  names.forEach((name, index) => {
    const y = (index + 0.5) * row;
    svg.append(make("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, short(name, Math.max(3, Math.floor((left - 8) / 6.6)))));
    for (const one of chart.series) {
      const group = make("g", { class: colour(one) }), value = one.y[index];
      const [low, high] = ends(one, index) ?? [null, null];
      if (one.look === "band" && high !== null)
        group.append(make("rect", { class: "band", x: x(low), y: y - 9, width: Math.max(0, x(high) - x(low)), height: 18 }));
      else if (high !== null)
        group.append(make("line", { class: "whisker", x1: x(low), x2: x(high), y1: y, y2: y }));
      if (one.look !== "band" && value !== null) group.append(mark(one, x(value), y));
      svg.append(group);
    }
  });
  return svg;
}

/* Every .chart shows view.charts[its name]; a list of them is one for each layer. */
function startCharts() {
  for (const place of document.querySelectorAll("[data-chart]")) {
    const found = view.charts[place.dataset.chart];
    const chart = () => (Array.isArray(found) ? found[state.layer] : found);
    const box = make("div", { class: "draw" }), below = make("div");
    place.replaceChildren(box, below);
    const redraw = drawn(box, (width) => {
      box.replaceChildren(chart().kind === "rows" ? rows(chart(), width) : lines(chart(), width));
      below.replaceChildren(legend(chart()));
    });
    if (Array.isArray(found)) changed.push(({ layer }) => { if (layer !== undefined) redraw(); });
  }
}
