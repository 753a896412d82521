/* One expert at a time: the tokens, domains and passages it is used for. */
function startExperts() {
  const cards = find("#cards"), many = view.experts > 48;
  cards.classList.toggle("many", many);
  const words = (entries) => entries.filter((entry) => entry[5])
    .map((entry) => view.strings[entry[0]].trim()).filter((text) => text && !text.startsWith("⟨"))
    .map((text) => text.replace(/\s/g, "␣"));
  const show = () => {
    const load = view.load[view.all_layers.indexOf(view.layers[state.layer])];
    const focused = cards.contains(document.activeElement);
    cards.replaceChildren(...load.map((times, expert) => {
      const chosen = expert === state.expert;
      return make("button", {
        class: "card", role: "radio", "aria-checked": chosen, tabindex: chosen ? 0 : -1,
        "data-expert": expert, "aria-label": `expert ${expert}, ${times.toFixed(2)} times an equal share`,
        onclick: () => update({ expert }),
      }, chip(expert), many ? null : make("span", { class: "times" }, `×${times.toFixed(2)}`),
        many ? null : make("span", { class: "words" }, words(view.tokens[state.layer][expert]).slice(0, 4).join(" · ") || "—"));
    }));
    if (focused) cards.querySelector("[aria-checked=true]").focus({ preventScroll: true });
    find("#expert").replaceChildren(...expertPanel());
  };
  roving(cards, ".card", (card) => update({ expert: Number(card.dataset.expert) }));
  changed.push(({ layer, expert }) => { if (layer !== undefined || expert !== undefined) show(); });
  show();
}

function expertPanel() {
  const { layer, expert } = state;
  const title = make("h3", {}, chip(expert), ` Expert ${expert} of layer ${view.layers[layer]}`);
  const left = make("div", {}, make("h3", {}, "Its most typical tokens"), tokenBars(layer, expert));
  const right = make("div", {}, make("h3", {}, "The domains that use it most"), domainBars(layer, expert));
  return [title, make("div", { class: "split" }, left, right), ...passagesOf(layer, expert)];
}

function bar(share, expert, low, high, equal) {
  const inside = (value) => Math.max(0, Math.min(1, value));
  const place = make("div", { class: "bar hue", "--h": hue(expert) }, make("i"));
  place.firstChild.style.width = `${100 * inside(share)}%`;
  if (equal !== null) place.append(make("s")), (place.lastChild.style.left = `${100 * inside(equal)}%`);
  if (low !== null && high !== null) {
    const line = make("u");
    line.style.left = `${100 * inside(low)}%`;
    line.style.width = `${100 * (inside(high) - inside(low))}%`;
    place.append(line);
  }
  return place;
}

function tokenBars(layer, expert) {
  const entries = view.tokens[layer][expert].filter((entry) => entry[5]);
  const load = view.load[view.all_layers.indexOf(view.layers[layer])][expert];
  const usual = (load * (view.top_k || 1)) / view.experts;
  if (!entries.length)
    return make("p", { class: "note" }, "No token leans to this expert beyond what chance allows.");
  return make("div", {},
    make("ul", { class: "bars" }, ...entries.map(([text, count, rate, lift, low]) => make("li", {
      title: `${number.format(count)} occurrences; ${lift.toFixed(1)} times the usual rate, at least ${low.toFixed(1)} times (95 %)`,
    },
      make("span", { class: "name tok" }, seen(view.strings[text])),
      bar(rate, expert, Math.min(rate, low * usual), rate, usual),
      make("span", { class: "num" }, percent(rate, 0))))),
    make("p", { class: "note" }, "Of the token's occurrences, how many came to this expert. The thin line starts at the least "
      + `that the noise allows; the dashed line is the rate of all tokens, ${percent(usual)}.`));
}

function domainBars(layer, expert) {
  const all = view.domains.map((name, domain) => {
    const at = table.at(layer, domain, expert);
    return { name, share: table.share[at] / 50000, low: table.value(table.low, at), high: table.value(table.high, at), sure: table.sure[at] };
  }).sort((a, b) => b.share - a.share);
  const most = Math.max(...all.map((one) => one.high ?? one.share), 1 / view.experts) || 1;
  return make("div", {},
    make("ul", { class: "bars" }, ...all.slice(0, 8).map((one) => make("li", {
      title: one.low === null ? "no interval" : `95 % interval ${percent(one.low)} to ${percent(one.high)}`,
    },
      make("span", { class: "name" }, `${one.sure ? "● " : "○ "}${one.name}`),
      bar(one.share / most, expert, one.low === null ? null : one.low / most, one.high === null ? null : one.high / most, 1 / view.experts / most),
      make("span", { class: "num" }, percent(one.share))))),
    make("p", { class: "note" }, `Of the domain's choices in this layer, how many fell on this expert${
      table.low ? ", with 95 % intervals" : " (intervals are in experts_by_domain.csv)"}; dashed: an equal share, ${
      percent(1 / view.experts)}. ● beyond chance, ○ may be chance.`));
}

function passagesOf(layer, expert) {
  const found = view.snippets[layer]?.[expert] ?? [];
  if (!found.length) return [];
  return [make("h3", {}, "Where it is used most"), ...found.map(({ d, s, w }) => make("blockquote", { class: "snippet" },
    make("cite", {}, view.domains[d]),
    make("span", { class: "text" }, ...s.map((text, index) => make("span", {
      class: "t hue", "--h": hue(expert), "--w": (Number(w[index]) / 9).toFixed(2), dir: "auto",
    }, view.strings[text].replace(/\n/g, "↵\n"))))))];
}
