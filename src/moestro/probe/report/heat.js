/* Heat maps: load by layer, and each domain's use of the experts of one layer. Cells of one colour
   are one path, so that thousands of experts stay quick. */
const BOUNDS = [0.25, 0.5, 0.8, 1.25, 2, 4];

/* 0 nothing, then 1 (far below an equal share) to 7 (far above). */
function step(ratio) {
  return ratio === 0 ? 0 : 1 + BOUNDS.filter((bound) => ratio >= bound).length;
}

function tone(step) { return step === 1 ? "on1" : step === 7 ? "on7" : ""; }

/* spec: rows() -> labels, columns (number), name(c) of a column, ratio(r, c), text(r, c), sure(r, c),
   told(r, c) -> what to say, pick(r, c). Returns a function that draws again. */
function heat(place, spec) {
  const box = place.querySelector(".draw"), read = place.querySelector(".read");
  let at = null, geometry = null, cursor = null;
  const say = () => {
    if (!at || !cursor) return;
    const { left, cell, height } = geometry;
    cursor.setAttribute("x", left + at[1] * cell);
    cursor.setAttribute("y", at[0] * height);
    cursor.setAttribute("visibility", "visible");
    read.replaceChildren(...spec.told(...at));
  };
  const redraw = drawn(box, (width) => {
    const rows = spec.rows(), columns = spec.columns;
    const letters = Math.max(...rows.map((row) => [...row].length));
    const left = Math.min(letters * 7 + 10, width * 0.3), cell = (width - left - 2) / columns;
    const height = rows.length > 30 ? 14 : 24, bottom = rows.length * height;
    geometry = { left, cell, height };
    const svg = make("svg", { viewBox: `0 0 ${width} ${bottom + 34}`, "aria-hidden": "true" });
    const paths = Array.from({ length: 8 }, () => []);
    const over = make("g");
    const gap = cell > 8 ? 1 : 0;
    rows.forEach((row, r) => {
      const label = short(row, Math.max(3, Math.floor((left - 8) / 6.6)));
      svg.append(make("text", { x: left - 6, y: (r + 0.5) * height + 4, "text-anchor": "end" }, label));
      for (let c = 0; c < columns; c++) {
        const which = step(spec.ratio(r, c));
        const x = (left + c * cell).toFixed(1), w = (cell - gap).toFixed(1);
        paths[which].push(`M${x} ${r * height}h${w}v${height - gap}h-${w}z`);
        const middle = left + (c + 0.5) * cell - gap / 2;
        if (cell >= 36 && height > 14)
          over.append(make("text", { class: `cell ${tone(which)}`, x: middle, y: (r + 0.5) * height + 4 }, spec.text(r, c)));
        if (spec.sure(r, c))
          over.append(cell >= 36
            ? make("circle", { class: `sure ${tone(which)}`, cx: left + (c + 1) * cell - 6, cy: r * height + 5, r: 2 })
            : make("circle", { class: `sure ${tone(which)}`, cx: middle, cy: (r + 0.5) * height, r: Math.min(2.2, cell / 3) }));
      }
    });
    paths.forEach((path, which) => svg.append(make("path", { class: `r${which}`, d: path.join("") })));
    const every = Math.max(1, Math.ceil(22 / cell));
    for (let c = 0; c < columns; c += every)
      svg.append(make("text", { x: left + (c + 0.5) * cell, y: bottom + 15, "text-anchor": "middle" }, `${spec.name(c)}`));
    svg.append(make("text", { x: left + (columns * cell) / 2, y: bottom + 31, "text-anchor": "middle" }, "expert"));
    cursor = make("rect", { class: "cursor", width: cell, height, rx: 2, visibility: "hidden" });
    svg.append(over, cursor);
    box.replaceChildren(svg);
    if (at && at[0] < rows.length) say();
  });
  const under = (event) => {
    const { left, cell, height } = geometry, box_ = box.getBoundingClientRect();
    const r = Math.floor((event.clientY - box_.top) / height);
    const c = Math.floor((event.clientX - box_.left - left) / cell);
    return r >= 0 && r < spec.rows().length && c >= 0 && c < spec.columns ? [r, c] : null;
  };
  const go = (to) => { at = to; say(); };
  box.addEventListener("pointermove", (event) => { const to = under(event); if (to) go(to); });
  box.addEventListener("click", (event) => { const to = under(event); if (to) { go(to); spec.pick(...to); } });
  box.addEventListener("focus", () => go(at ?? [0, 0]));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return spec.pick(...(at ?? [0, 0])); }
    if (!move) return;
    event.preventDefault();
    const [r, c] = at ?? [0, 0];
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    go([within(r + move[0], spec.rows().length), within(c + move[1], spec.columns)]);
  });
  return redraw;
}

function bold(text) { return make("b", {}, text); }

function range(low, high, form) {
  return low === null || high === null ? "no interval: one document only" : `${form(low)} to ${form(high)}`;
}

function startLoad() {
  const times = (value) => value.toFixed(2);
  heat(find("#load .figure"), {
    rows: () => view.all_layers.map((layer) => `layer ${layer}`),
    columns: view.experts,
    name: (c) => c,
    ratio: (r, c) => view.load[r][c],
    text: (r, c) => view.load[r][c].toFixed(1),
    sure: () => false,
    told: (r, c) => [
      bold(`Layer ${view.all_layers[r]}, expert ${c}: ${times(view.load[r][c])} times an equal share`),
      ` (95 % interval ${range(view.load_low[r][c], view.load_high[r][c], times)}).`,
    ],
    pick: (r, c) => choose(view.layers.indexOf(view.all_layers[r]), c),
  });
}

/* Show an expert, and the layer it is in, everywhere on the page. */
function choose(layer, expert) {
  update(layer >= 0 ? { layer, expert } : { expert });
}

const table = {
  share: unpack(view.table.share, true),
  low: view.table.low && unpack(view.table.low, true),
  high: view.table.high && unpack(view.table.high, true),
  sure: unpack(view.table.sure),
  at: (layer, domain, expert) => (layer * view.domains.length + domain) * view.experts + expert,
  value: (packed, at) => (packed && packed[at] !== 65535 ? packed[at] / 50000 : null),
};

/* The layer's experts in the order of the domain that uses each most; one domain's, most used first. */
function byDomain(layer) {
  const best = Array.from({ length: view.experts }, (_, expert) => {
    let top = 0;
    view.domains.forEach((_, domain) => {
      if (table.share[table.at(layer, domain, expert)] > table.share[table.at(layer, top, expert)]) top = domain;
    });
    return { expert, top, share: table.share[table.at(layer, top, expert)] };
  });
  return best.sort((a, b) => a.top - b.top || b.share - a.share).map((one) => one.expert);
}

function startDomains() {
  const place = find("#domains .figure"), sorted = find("#sorted");
  let order = [];
  const arrange = () => { order = sorted.checked ? byDomain(state.layer) : [...Array(view.experts).keys()]; };
  const at = (r, c) => table.at(state.layer, r, order[c]);
  const share = (r, c) => table.share[at(r, c)] / 50000;
  arrange();
  const redraw = heat(place, {
    rows: () => view.domains,
    columns: view.experts,
    name: (c) => order[c],
    ratio: (r, c) => share(r, c) * view.experts,
    text: (r, c) => (100 * share(r, c)).toFixed(0),
    sure: (r, c) => table.sure[at(r, c)] === 1,
    told: (r, c) => [
      bold(`${view.domains[r]}, expert ${order[c]}: ${percent(share(r, c))} of the choices`),
      table.low ? ` (95 % interval ${range(table.value(table.low, at(r, c)), table.value(table.high, at(r, c)), percent)}; ` : " (",
      `an equal share is ${percent(1 / view.experts)}). `,
      table.sure[at(r, c)] ? "Differs from what dealing the documents to the domains at random gives." : "May be chance.",
    ],
    pick: (r, c) => choose(state.layer, order[c]),
  });
  const again = () => { arrange(); redraw(); };
  sorted.addEventListener("change", again);
  changed.push(({ layer }) => { if (layer !== undefined) again(); });
}
