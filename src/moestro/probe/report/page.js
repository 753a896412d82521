/* The page's data and state, and the parts of it that all others share. Text of documents is
   hostile: it only ever becomes text nodes and attributes, never markup. */
"use strict";
const root = document.documentElement;
addEventListener("error", (event) => { root.dataset.state = `failed: ${event.message}`; });
const view = JSON.parse(document.getElementById("view").textContent);
const state = { layer: view.first_layer, expert: 0 };
const changed = [];
const number = new Intl.NumberFormat("en");

function update(changes) {
  Object.assign(state, changes);
  for (const listener of changed) listener(changes);
}

function make(tag, attributes = {}, ...children) {
  const svg = /^(svg|g|path|rect|circle|line|polyline|text|title)$/.test(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("aria-")) element.setAttribute(name, `${value}`);
    else if (value === false) continue;
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function find(selector) { return document.querySelector(selector); }

function percent(share, digits = 1) { return `${(100 * share).toFixed(digits)}\u00a0%`; }

/* Numbers packed in base64, little-endian. */
function unpack(text, wide = false) {
  const binary = atob(text);
  const bytes = Uint8Array.from(binary, (sign) => sign.charCodeAt(0));
  return wide ? new Uint16Array(bytes.buffer) : bytes;
}

/* Far apart on the colour wheel for neighbouring numbers, however many there are. */
function hue(expert) { return ((expert * 137.508 + 250) % 360).toFixed(1); }

function chip(expert) { return make("span", { class: "e hue", "--h": hue(expert) }, `${expert}`); }

/* White space that has no shape of its own. */
function seen(piece) {
  return piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣").replace(/^$/, "·");
}

function short(text, most) {
  const signs = [...text];
  return signs.length > most ? `${signs.slice(0, most - 1).join("")}…` : text;
}

/* Draw now, and again whenever the place becomes wider or narrower. */
function drawn(place, draw) {
  let width = 0;
  // In the next frame: drawing changes the height, which the observer must not see meanwhile.
  new ResizeObserver(() => requestAnimationFrame(() => {
    const now = Math.floor(place.clientWidth);
    if (now && now !== width) draw((width = now));
  })).observe(place);
  return () => { if (width) draw(width); };
}

/* Arrow keys move within a group of elements of which one can be reached by Tab. */
function roving(group, selector, chosen) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  group.addEventListener("keydown", (event) => {
    const all = [...group.querySelectorAll(selector)];
    let to = all.indexOf(event.target.closest(selector));
    if (to < 0) return;
    if (event.key in steps) to += steps[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = all.length - 1;
    else return;
    event.preventDefault();
    to = Math.max(0, Math.min(all.length - 1, to));
    all[to].focus();
    chosen(all[to]);
  });
}

function startTheme() {
  const button = find("#theme");
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => {
    button.setAttribute("aria-pressed", isDark());
    button.textContent = isDark() ? "☾" : "☀";
  };
  const asked = new URLSearchParams(location.search).get("theme");
  let kept = null;
  try { kept = localStorage.getItem("moestro-theme"); } catch { /* a page that may not keep */ }
  if (["light", "dark"].includes(asked ?? kept)) root.dataset.theme = asked ?? kept;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("moestro-theme", root.dataset.theme); } catch { /* as above */ }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

function startLayer() {
  const select = find("#layer");
  view.layers.forEach((layer, index) => select.append(make("option", { value: index }, `${layer}`)));
  select.addEventListener("change", () => update({ layer: Number(select.value) }));
  const show = () => {
    select.value = state.layer;
    for (const place of document.querySelectorAll("[data-layer]"))
      place.textContent = view.layers[state.layer];
  };
  changed.push(show);
  show();
}

function start(parts) {
  root.dataset.script = "";
  startTheme();
  startLayer();
  for (const part of parts) part();
  const measure = () => {
    root.dataset.width = root.clientWidth;
    root.dataset.overflow = Math.max(0, root.scrollWidth - root.clientWidth);
  };
  addEventListener("resize", measure);
  requestAnimationFrame(() => requestAnimationFrame(measure));
  root.dataset.state ??= "ready";
}
