/* Reading a passage with every token in the colour of its expert. */
function startReading() {
  if (!view.passages.length) return;
  const select = find("#passage"), text = find("#text"), only = find("#only");
  view.passages.forEach((passage, index) => select.append(
    make("option", { value: index }, `${view.domains[passage.domain]} · ${short(passage.document, 40)}`)));
  for (const passage of view.passages)
    for (const [name, wide] of [["experts", view.experts > 254], ["weights"], ["margin"], ["entropy"]])
      passage[name] = unpack(passage[name], wide);
  let alone = null, selected = 0;
  const passage = () => view.passages[Number(select.value)];
  const show = () => {
    selected = Math.min(selected, passage().pieces.length - 1);
    text.replaceChildren(...tokensOf(passage(), alone));
    only.replaceChildren(...usedIn(passage(), alone, (expert) => { alone = alone === expert ? null : expert; show(); }));
    point(selected);
  };
  const point = (index) => {
    text.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    text.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    const token = text.children[(selected = index)];
    token.setAttribute("aria-selected", "true");
    token.setAttribute("tabindex", "0");
    find("#inspect").replaceChildren(...inspected(passage(), index));
  };
  const over = (event) => {
    const token = event.target.closest(".t");
    if (token) point(Number(token.dataset.at));
  };
  for (const name of ["pointerover", "click", "focusin"]) text.addEventListener(name, over);
  roving(text, ".t", () => {});
  select.addEventListener("change", () => { selected = 0; alone = null; show(); });
  find("#numbers").addEventListener("change", (event) => text.classList.toggle("bare", !event.target.checked));
  changed.push(({ layer }) => { if (layer !== undefined) { alone = null; show(); } });
  show();
}

/* The experts and weights of a token in a layer, without empty places. */
function choices(passage, token, layer) {
  const width = view.places, start = (token * view.layers.length + layer) * width;
  return Array.from({ length: width }, (_, k) => ({
    expert: passage.experts[start + k], weight: (passage.weights[start + k] / 255) * view.largest_weight,
  })).filter((choice) => choice.expert < view.experts);
}

function tokensOf(passage, alone) {
  let before = null;
  return passage.pieces.map((piece, index) => {
    const chosen = choices(passage, index, state.layer);
    const expert = chosen[0]?.expert ?? null;
    const off = expert === null || (alone !== null && !chosen.some((choice) => choice.expert === alone));
    const shown = alone !== null && !off ? alone : expert;
    const token = make("span", {
      class: `t hue${off ? " off" : ""}${piece === "" ? " part" : ""}`, "--h": hue(shown ?? 0), role: "option",
      "aria-selected": "false", tabindex: -1, dir: "auto", "data-at": index, "data-e": !off && shown !== before ? shown : null,
      "aria-label": `${seen(piece)}, ${expert === null ? "no expert" : `expert ${expert}`}`,
    }, piece === "" ? "·" : piece.replace(/\n/g, "↵\n"));
    before = off ? null : shown;
    return token;
  });
}

/* Buttons for the experts of a passage, most used first, each to look at alone. */
function usedIn(passage, alone, toggle) {
  const times = new Map();
  passage.pieces.forEach((_, index) => {
    for (const { expert } of choices(passage, index, state.layer)) times.set(expert, (times.get(expert) ?? 0) + 1);
  });
  const total = [...times.values()].reduce((sum, count) => sum + count, 0) || 1;
  return [...times].sort((a, b) => b[1] - a[1]).slice(0, 16).map(([expert, count]) => make("button", {
    "aria-pressed": alone === expert, "aria-label": `show only expert ${expert}`, onclick: () => toggle(expert),
  }, chip(expert), ` ${percent(count / total, 0)}`));
}

function inspected(passage, index) {
  const layer = state.layer, at = index * view.layers.length + layer, piece = passage.pieces[index];
  const chosen = choices(passage, index, layer), margin = passage.margin[at], entropy = passage.entropy[at];
  const sum = chosen.reduce((total, choice) => total + choice.weight, 0) || 1;
  const written = passage.generated !== null && index >= passage.generated;
  return [
    make("p", { class: "tok", dir: "auto" }, piece === "" ? "part of a character" : seen(piece)),
    make("small", {}, `token ${index + 1} of ${passage.pieces.length}, layer ${view.layers[layer]}${written ? ", written by the model" : ""}`),
    make("ul", { class: "bars" }, ...chosen.map(({ expert, weight }) => make("li", {},
      chip(expert), bar(weight / sum, expert, null, null, null), make("span", { class: "num" }, weight.toFixed(2))))),
    make("dl", {},
      ...(margin === 255 ? [] : [make("dt", {}, "Next best"), make("dd", {}, nextBest((margin / 127) - 1))]),
      ...(entropy === 255 ? [] : [make("dt", {}, "Undecided"), make("dd", {}, `${percent(entropy / 254, 0)} (0 sure, 100 all experts alike)`)])),
    make("h3", {}, "Its way through the layers"),
    path(passage, index),
  ];
}

function nextBest(margin) {
  return margin < -0.008 ? `another expert was ${percent(-margin, 0)} more likely; a bias or a grouping of experts decided otherwise`
    : `an expert not chosen was ${percent(Math.max(0, margin), 0)} less likely`;
}

/* Each layer a row of all experts, the chosen ones filled. */
function path(passage, index) {
  const width = 280, left = 26, cell = (width - left) / view.experts;
  const height = view.layers.length > 24 ? 7 : 15, size = view.layers.length * height;
  const said = view.layers.map((layer, l) => `layer ${layer}: ${choices(passage, index, l).map((one) => one.expert).join(" and ")}`);
  const svg = make("svg", { viewBox: `0 0 ${width} ${size}`, role: "img", "aria-label": said.join("; ") });
  view.layers.forEach((layer, l) => {
    const y = l * height;
    if (height > 10 || l % 4 === 0) svg.append(make("text", { x: left - 6, y: y + Math.max(height - 4, 7), "text-anchor": "end" }, `${layer}`));
    svg.append(make("rect", { class: `lane${l === state.layer ? " here" : ""}`, x: left, y: y + 1, width: width - left, height: height - 2 }));
    for (const { expert } of choices(passage, index, l)) {
      const dot = make("rect", { class: "hue way", "--h": hue(expert), x: left + expert * cell, y: y + 1, width: Math.max(2, cell - 1), height: height - 2 });
      svg.append(dot);
    }
  });
  return make("div", { class: "draw" }, svg);
}

start([startLoad, startDomains, startCharts, startExperts, startReading]);
