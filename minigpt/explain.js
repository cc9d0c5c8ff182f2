"use strict";
const T = data.tokens.length, heads = data.heads, triangle = T * (T + 1) / 2;
const bytes = Uint8Array.from(atob(data.roots), c => c.charCodeAt(0));
const $ = id => document.getElementById(id);
const symbol = t => data.symbols[data.tokens[t]];
const glyph = s => ({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})[s] ?? s;
const place = t => t * (t + 1) / 2;

// roots[layer][head]: the lower triangle of square roots of weights, in 255ths, row by row; the last of a layer is the mean
const roots = Array.from({length: data.layers}, (_, layer) => {
  const own = Array.from({length: heads}, (_, h) => bytes.subarray((layer * heads + h) * triangle, (layer * heads + h + 1) * triangle));
  if (heads > 1) own.push(Uint8Array.from({length: triangle}, (_, i) => Math.sqrt(own.reduce((sum, m) => sum + m[i] ** 2, 0) / heads) + 0.5));
  return own;
});
const weight = (map, row, column) => (map[place(row) + column] / 255) ** 2;

const state = {kept: null, over: null, layer: data.layers - 1, head: roots[0].length - 1, cell: null};
const shown = () => state.over ?? state.kept;
const map = () => roots[state.layer][state.head];
const headName = (layer, head) => `layer ${layer + 1}, ` + (head < heads ? `head ${head + 1}` : `mean of ${heads} heads`);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function percent(p) {
  const x = 100 * p;
  return x >= 99.95 && p < 1 ? "> 99.9 %" : x >= 10 ? `${x.toFixed(0)} %` : x >= 1 ? `${x.toFixed(1)} %` : x >= 0.01 ? `${x.toFixed(2)} %` : x > 0 ? "< 0.01 %" : "0";
}

function ordinal(n) {
  const end = n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th";
  return n === 1 ? "the likeliest" : `the ${n}${end} likeliest`;
}

let inks = {};
function ink(name) {
  if (inks[name]) return inks[name];
  const probe = document.body.appendChild(element("i", {style: `color: var(--${name})`}));
  const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return inks[name] = [r, g, b];
}

const chips = [];
function writeText() {
  const text = $("text");
  if (data.left_out) text.append(element("span", {class: "cut", title: `${data.left_out} tokens before`}, "…"));
  $("prompt").hidden = !data.given;
  for (let t = 0; t <= T; t++) {
    const s = t < T ? symbol(t) : "?", facts = data.places[t];
    const chip = element("span", {class: "chip", id: `t${t}`, role: "option", "aria-selected": "false"}, s === " " ? s : glyph(s));
    if (s === "\n") chip.classList.add("break");
    if (t < data.given) chip.classList.add("given");
    if (t === T) chip.classList.add("next");
    if (facts?.bits !== undefined) chip.style.setProperty("--s", Math.min(1, facts.bits / 8).toFixed(3));
    chips.push(chip);
    text.append(chip);
    if (s === "\n") text.append("\n");
  }
  const hit = event => event.target.closest(".chip") && chips.indexOf(event.target.closest(".chip"));
  text.addEventListener("pointerover", event => { const t = hit(event); if (t !== null) look({over: t}); });
  text.addEventListener("pointerleave", () => look({over: null}));
  text.addEventListener("click", event => { const t = hit(event); if (t !== null) look({kept: t}); });
}

function shadeText() {
  const t = shown(), row = t === null ? -1 : t - 1;
  $("text").classList.toggle("reading", row >= 0);
  chips.forEach((chip, i) => {
    chip.style.setProperty("--a", i <= row ? (map()[place(row) + i] / 255).toFixed(3) : 0);
    chip.classList.toggle("on", i === t);
    chip.classList.toggle("kept", i === state.kept);
    chip.setAttribute("aria-selected", i === state.kept);
  });
  if (state.kept === null) $("text").removeAttribute("aria-activedescendant");
  else $("text").setAttribute("aria-activedescendant", `t${state.kept}`);
}

function verdict(t, facts) {
  if (t === null) {
    const mean = list => (list.reduce((sum, p) => sum + p.bits, 0) / list.length).toFixed(2);
    const given = data.places.slice(0, data.given).filter(Boolean), drawn = data.places.slice(data.given, T);
    const parts = [given.length && `${mean(given)} bits a token over the prompt`, drawn.length && `${mean(drawn)} over what was drawn`];
    return parts.some(Boolean) ? `The model's surprise, on average: ${parts.filter(Boolean).join(", ")}.` : "";
  }
  if (!facts) return data.left_out ? "The text shown begins here; what stood before it is out of the model's sight." : "The text begins here: nothing was read to predict it.";
  if (t === T) return "Not drawn: these may come next.";
  const [, p, own] = facts.candidates.find(([id]) => id === data.tokens[t]);
  const bits = `${facts.bits.toFixed(facts.bits < 10 ? 2 : 1)} bits of surprise`;
  const unseen = t ? "" : " What was read to choose it is out of sight.";
  if (t < data.given) return `The model gives it ${percent(p)}: ${ordinal(facts.rank)} of ${data.symbols.length}, ${bits}.`;
  const among = facts.open > 1 ? `${ordinal(facts.rank)} of ${facts.open} candidates` : "the only candidate";
  return `Drawn with ${percent(p)}, ${among}. The model itself gives it ${percent(own)}: ${bits}.${unseen}`;
}

function bars(list, rows, count) {
  list.replaceChildren(...rows, ...Array.from({length: count - rows.length}, () => element("li", {class: "empty"}, "·")));
}

function describe() {
  const t = shown(), facts = t === null ? null : data.places[t];
  const kind = t === T ? "to come" : t < data.given ? "in the prompt" : "drawn";
  if (t === null) $("token").replaceChildren("No token selected");
  else $("token").replaceChildren(element("span", {class: "mono"}, t < T ? glyph(symbol(t)) : "?"), `${kind} `, element("small", {}, t < T ? `token ${t + 1} of ${T}` : "after the last token"));
  $("verdict").textContent = verdict(t, facts);
  const drawn = t >= data.given;
  bars($("candidates"), (facts?.candidates ?? []).map(([id, p, own]) => {
    const bar = element("span", {class: drawn ? "bar tick" : "bar", style: `--p: ${p}; --own: ${own}`});
    return element("li", {class: id === data.tokens[t] ? "taken" : ""}, element("span", {class: "mono"}, glyph(data.symbols[id])), bar, element("span", {}, percent(p)));
  }), Math.min(10, data.symbols.length));
  $("key").textContent = !facts ? "\u00a0" : drawn ? `Bars: what was drawn from, with ${data.sampling}. Ticks: the model's own.` : "Bars: the model's own probabilities.";

  const row = t === null ? -1 : t - 1;
  $("source").classList.toggle("empty", !t);
  $("source").replaceChildren(drawn ? "Read to choose it" : "Read to predict it", element("small", {}, ` ${headName(state.layer, state.head)}`));
  const most = Array.from({length: row + 1}, (_, j) => [weight(map(), row, j), j]).sort((a, b) => b[0] - a[0] || b[1] - a[1]).slice(0, 6);
  bars($("reads"), most.map(([w, j]) => {
    const around = (from, to) => Array.from({length: Math.max(0, to - from)}, (_, i) => glyph(symbol(from + i)).replace("␣", " ")).join("");
    const before = around(Math.max(0, j - 6), j), after = around(j + 1, Math.min(row + 1, j + 7));
    const snippet = element("span", {class: "mono"}, element("i", {}, before.slice(-6).padStart(6)), glyph(symbol(j)), element("i", {}, after));
    return element("li", {}, snippet, element("span", {class: "bar", style: `--p: ${w}`}), element("span", {}, percent(w)), element("span", {class: "away"}, `${row + 1 - j} back`));
  }), 6);
}

function paint(canvas, map, size) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size), bytes = image.data;
  for (let i = 0, at = 0; i < T; i++) {
    const row = Math.floor(i * size / T) * size;
    for (let j = 0; j <= i; j++, at++) {
      const alpha = 4 * (row + Math.floor(j * size / T)) + 3;
      bytes[alpha] = Math.max(bytes[alpha], map[at], 1); // the largest of those that share the pixel
    }
  }
  const ground = ink("panel"), full = ink("forward");
  for (let p = 0; p < bytes.length; p += 4) {
    const root = bytes[p + 3] / 255;
    for (let c = 0; c < 3; c++) bytes[p + c] = ground[c] + (full[c] - ground[c]) * root;
    if (root) bytes[p + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function writeHeads() {
  const columns = roots[0].length, wide = columns > 7, grid = $("grid");
  grid.classList.toggle("coarse", T < 50);
  grid.style.gridTemplateColumns = `auto repeat(${columns}, minmax(0, 96px))`;
  grid.append(element("span"), ...Array.from({length: columns}, (_, h) => element("span", {}, h < heads ? (wide ? `${h + 1}` : `head ${h + 1}`) : wide ? "all" : "mean")));
  roots.forEach((maps, layer) => {
    grid.append(element("span", {class: "row"}, wide ? `${layer + 1}` : `layer ${layer + 1}`));
    maps.forEach((_, head) => {
      const button = element("button", {type: "button", title: headName(layer, head), "aria-label": headName(layer, head)}, element("canvas"));
      button.addEventListener("click", () => look({layer, head}));
      grid.append(button);
    });
  });
}

function paintHeads() {
  document.querySelectorAll("#grid canvas").forEach((canvas, i) => paint(canvas, roots.flat()[i], Math.min(T, 128)));
}

function pressHead() {
  const chosen = state.layer * roots[0].length + state.head;
  document.querySelectorAll("#grid button").forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  $("which").textContent = headName(state.layer, state.head).replace("l", "L");
  paint(whole, map(), T);
}

const whole = document.createElement("canvas");
const frame = {margin: 0, cell: 1};

function drawMatrix() {
  const canvas = $("matrix");
  canvas.style.maxWidth = `${18 + 32 * T}px`;
  const size = canvas.clientWidth, ratio = devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = canvas.height = Math.round(size * ratio);
  context.scale(ratio, ratio);
  frame.margin = (size - 20) / T >= 11 ? 18 : 0;
  const {margin} = frame, end = size - 2, plot = end - margin, cell = frame.cell = plot / T;
  const css = name => `rgb(${ink(name)})`;
  context.imageSmoothingEnabled = cell * ratio < 1;
  context.drawImage(whole, margin, margin, plot, plot);
  if (margin) {
    context.fillStyle = css("faint");
    context.font = '11px ui-monospace, "DejaVu Sans Mono", monospace';
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let t = 0; t < T; t++) {
      context.fillText(glyph(symbol(t)), margin + (t + 0.5) * cell, 8, cell);
      context.fillText(t + 1 < T ? glyph(symbol(t + 1)) : "?", 8, margin + (t + 0.5) * cell, 16);
    }
  }
  context.strokeStyle = css("ink");
  const row = shown() === null ? -1 : shown() - 1;
  if (row >= 0) context.strokeRect(margin + 0.5, margin + row * cell - 0.5, (row + 1) * cell, cell + 1);
  if (state.cell) context.strokeRect(margin + state.cell.column * cell - 1, margin + row * cell - 1, cell + 2, cell + 2);
  canvas.setAttribute("aria-label", `Attention weights of ${headName(state.layer, state.head)}, ${T} by ${T}`);
  readout(row);
}

function readout(row) {
  const column = state.cell?.column;
  if (column === undefined) {
    $("readout").textContent = "A row for each choice, from top to bottom; a column for each token that it could read. Point at a cell for its weight.";
    return;
  }
  const quoted = s => element("code", {}, glyph(s));
  $("readout").replaceChildren("To choose ", row + 1 < T ? quoted(symbol(row + 1)) : "what comes next", ` (${row + 2}), `, quoted(symbol(column)), ` (${column + 1}) is read with ${percent(weight(map(), row, column))}.`);
}

function pointAt(event) {
  const box = $("matrix").getBoundingClientRect(), {margin, cell} = frame;
  const column = Math.floor((event.clientX - box.left - margin) / cell), row = Math.floor((event.clientY - box.top - margin) / cell);
  return column >= 0 && row >= column && row < T ? {column, row} : null;
}

function look(change) {
  const before = {...state};
  Object.assign(state, {cell: null}, change);
  if (before.layer !== state.layer || before.head !== state.head) pressHead();
  shadeText();
  describe();
  drawMatrix();
}

function above(t, direction) {
  const here = chips[t].getBoundingClientRect();
  let best = null;
  chips.forEach((chip, i) => {
    const box = chip.getBoundingClientRect(), down = (box.top - here.top) * direction;
    if (down > 5) {
      const far = [Math.round(down / 5), Math.abs(box.left - here.left)];
      if (!best || far[0] < best.far[0] || (far[0] === best.far[0] && far[1] < best.far[1])) best = {far, i};
    }
  });
  return best ? best.i : t;
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const {key} = event, step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[key], sideways = key === "ArrowLeft" || key === "ArrowRight";
  const inText = document.activeElement === $("text"), clamp = (x, end) => Math.max(0, Math.min(end, x));
  let kept;
  if (key === "Escape") kept = null;
  else if (step && event.shiftKey) {
    event.preventDefault();
    return look(sideways ? {head: clamp(state.head + step, roots[0].length - 1)} : {layer: clamp(state.layer + step, data.layers - 1)});
  } else if (step && sideways) kept = state.kept === null ? Math.max(1, data.given) : clamp(state.kept + step, T);
  else if (step && inText) kept = state.kept === null ? Math.max(1, data.given) : above(state.kept, step);
  else if (inText && (key === "Home" || key === "End")) kept = key === "Home" ? 0 : T;
  else return;
  event.preventDefault();
  look({kept, over: null});
  if (kept !== null) chips[kept].scrollIntoView({block: "nearest"});
});

const matrix = $("matrix");
matrix.addEventListener("pointermove", event => { const cell = pointAt(event); look({over: cell && cell.row + 1, cell}); });
matrix.addEventListener("pointerleave", () => look({over: null}));
matrix.addEventListener("click", event => { const cell = pointAt(event); if (cell) look({kept: cell.row + 1, over: cell.row + 1, cell}); });

function notes() {
  const told = [];
  if (data.left_out) told.push(`The text has ${T + data.left_out} tokens; the model sees the last ${T}, which are shown. A drawn token's candidates are those it was drawn from, when the model saw the ${T} tokens before it; attention is of one pass over the tokens shown, in which the first have less to read than they had then.`);
  told.push("Each token is chosen where the one before it stands: there every head reads that token and those before it, with weights that add up to 1. Shades follow the square root of a weight, so that small ones are seen. Weights are kept in 8 bits, of their square root: off by less than 0.4 percentage points, small ones by far less.");
  $("notes").append(...told.map(text => element("p", {}, text)));
}

function repaint() {
  inks = {};
  paintHeads();
  pressHead();
  look({});
}

$("about").append(...data.about.map(fact => element("span", {}, fact + " ")));
writeText();
writeHeads();
notes();
state.kept = Math.max(Math.min(T, Math.max(1, data.given)), T >> 1);
repaint();
new ResizeObserver(drawMatrix).observe(matrix);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
$("text").focus({preventScroll: true});
