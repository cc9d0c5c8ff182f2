const {nodes, groups, arrays} = data, last = nodes.length;
const byId = id => document.getElementById(id);
const maker = create => (tag, attributes = {}, ...children) => {
  const element = create(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== false && child !== ""));
  return element;
};
const html = maker(tag => document.createElement(tag));
const svg = maker(tag => document.createElementNS("http://www.w3.org/2000/svg", tag));
const plural = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const mean = numbers => numbers.reduce((a, b) => a + b, 0) / numbers.length;

// Numbers, arrays and names as text

function text(x, digits = 4) {
  if (typeof x !== "number") return {nan: "NaN", inf: "∞", "-inf": "−∞"}[x] ?? String(x);
  const size = Math.abs(x);
  const whole = Math.floor(Math.log10(size || 1)) + 1; // digits before the point are never rounded away
  const shown = x === 0 || (size >= 1e-3 && size < 1e6) ? String(+x.toPrecision(Math.max(digits, whole)))
    : x.toExponential(digits - 2).replace(/\.?0*e\+?/, "e");
  return shown.replaceAll("-", "−");
}

function short(place, room) {
  const array = arrays[place];
  if (array.not_finite) return `${array.not_finite.toLocaleString("en")} not finite`;
  if (array.bins && array.min === array.max) return `all ${text(array.min, 3)}`;
  if (array.bins) return `${text(array.mean, 3)} ± ${text(array.std, 3)}`;
  if (!array.numbers) return null;
  if (!array.shape.length) return text(array.numbers[0]);
  let line = "";
  for (const [i, x] of array.numbers.entries()) {
    const next = line + (i ? ", " : "") + text(x, 3);
    if (next.length + (i + 1 < array.numbers.length ? 3 : 0) > room - 2) return `[${line}${line && ", "}…]`;
    line = next;
  }
  return `[${line}]`;
}

const shapeOf = place => arrays[place].shape.length ? `(${arrays[place].shape.join("×")})` : "scalar";
const pathOf = g => g === null ? "" : [pathOf(groups[g].parent), groups[g].name].filter(Boolean).join(".");
const kindOf = g => groups[g].kind === groups[g].name ? "" : groups[g].kind;
const titleOf = g => groups[g].name + (groups[g].call > 1 ? `, call ${groups[g].call}` : "");
const fileOf = node => node.line.split(/[\\/]/).at(-1);
const nameOf = i => nodes[i].op === "leaf" ? nodes[i].name || "leaf" : nodes[i].op;

const pen = document.createElement("canvas").getContext("2d");
const BOLD = "600 13px system-ui, sans-serif", MONO = '11px ui-monospace, "DejaVu Sans Mono", monospace';
function measure(line, font) { pen.font = font; return pen.measureText(line).width; }
function fitted(line, width, font) {
  if (measure(line, font) <= width) return line;
  while (line && measure(line + "…", font) > width) line = line.slice(0, -1);
  return line + "…";
}

// What there is to draw: modules that hold modules and nodes. Steps go backward, so the last node is the oldest.

const WIDTH = 232, HEAD = 32, PAD = 20, GAP = 62, SIDE = 28;
const root = {id: "root", parent: null, open: true, children: []};
const boxes = groups.map((_, g) => ({id: `g${g}`, group: g, parent: null, open: false, children: []}));
const cards = nodes.map((node, i) => ({id: `n${i}`, node: i, parent: null, w: WIDTH, h: 66, leaf: node.op === "leaf"}));
for (let i = last - 1; i >= 0; i--) {
  let item = cards[i];
  for (let g = nodes[i].group; item !== root && !item.parent; item = item.parent) {
    item.parent = g === null ? root : boxes[g];
    item.parent.children.push(item);
    if (g !== null) g = groups[g].parent;
  }
}
for (const box of [root, ...boxes]) { // many parameters that several calls share are a box of their own
  const near = new Set(nodes.flatMap((node, v) => cards[v].parent === box ? node.inputs.map(input => input.node) : []));
  const shared = box.children.filter(child => child.leaf && !near.has(child.node));
  if (shared.length < 5) continue;
  const parameters = {id: `g${boxes.length}`, group: groups.length, parent: box, open: false, children: shared};
  groups.push({name: "parameters", kind: "shared", parent: null, call: 1});
  boxes.push(parameters);
  for (const leaf of shared) leaf.parent = parameters;
  box.children = [parameters, ...box.children.filter(child => !shared.includes(child))];
}
(function dissolve(box) { // a module of one node says no more than the node
  box.children = box.children.map(child => {
    if (!child.children) return child;
    dissolve(child);
    if (child.children.length > 1) return child;
    child.gone = true;
    return Object.assign(child.children[0], {parent: box});
  });
})(root);
const modules = boxes.filter(box => !box.gone);
for (const box of modules) box.members = (function all(item) { return item.children?.flatMap(all) ?? [item.node]; })(box);
for (const box of modules) box.open = last <= 40;

function visible(i) {
  let shown = cards[i];
  for (let box = shown.parent; box; box = box.parent) if (!box.open) shown = box;
  return shown;
}

// Layout: every open module is laid out by itself, in rows from the top down, and is one box to the module around it.
// An edge passes through the border of a module at a port, a point in its first or its last row.

let edges = [];

function connect() {
  const found = new Map();
  nodes.forEach((node, v) => node.inputs.forEach(input => {
    if (input.node === null) return;
    const from = visible(input.node), to = visible(v), key = `${from.id} ${to.id}`;
    if (from === to) return;
    if (!found.has(key)) found.set(key, {from, to, inputs: [], links: []});
    found.get(key).inputs.push({...input, v});
  }));
  edges = [...found.values()];
  for (const box of [root, ...modules]) Object.assign(box, {links: new Map(), ports: new Map()});
  const around = item => item.parent ? [...around(item.parent), item.parent] : [];
  for (const edge of edges) {
    const outer = around(edge.from), inner = around(edge.to);
    let common = 0;
    while (outer[common + 1] && outer[common + 1] === inner[common + 1]) common++;
    let item = edge.from;
    for (const box of outer.slice(common + 1).reverse()) {
      link(box, item, port(box, edge.from, false), edge);
      item = box;
    }
    const way = [...inner.slice(common + 1), edge.to];
    link(outer[common], item, way[0], edge);
    way.slice(1).forEach((next, i) => link(way[i], port(way[i], edge.from, true), next, edge));
  }
}

function port(box, source, entering) {
  const id = portId(source, entering);
  if (!box.ports.has(id)) box.ports.set(id, {id, w: 0, h: 0, isPort: true, entering});
  return box.ports.get(id);
}
const portId = (source, entering) => (entering ? "into " : "out of ") + source.id;

function link(box, from, to, edge) {
  const key = `${edge.from.id} ${from.id} ${to.id}`;
  if (!box.links.has(key)) box.links.set(key, {box, from, to, source: edge.from, stops: []});
  edge.links.push(box.links.get(key));
}

function arrange(box) {
  for (const child of box.children) {
    if (child.open) arrange(child);
    else if (child.children) Object.assign(child, {w: WIDTH, h: 72});
  }
  const rows = rowsOf([...box.children, ...box.ports.values()], [...box.links.values()]);
  order(rows);
  place(rows);
  straighten(rows);
  const left = Math.min(...rows.flat().map(item => item.cx - item.w / 2));
  const right = Math.max(...rows.flat().map(item => item.cx + item.w / 2));
  const title = box === root ? 0 : measure(`${titleOf(box.group)} ${kindOf(box.group)}`, BOLD) + 30;
  const width = Math.max(right - left, title);
  let y = box === root ? PAD : HEAD;
  rows.forEach((row, r) => {
    const h = Math.max(...row.map(item => item.h));
    for (const item of row) {
      item.cx += PAD + (width - right - left) / 2;
      item.x = item.cx - item.w / 2;
      item.y = y + (item.leaf ? h - item.h : (h - item.h) / 2);
      Object.assign(item, {top: y, bottom: y + h});
    }
    const border = [row, rows[r + 1] ?? row].some(row => row.every(item => item.isPort));
    y += h + (r + 1 === rows.length ? 0 : border ? PAD : GAP);
  });
  const leaves = [...box.ports.values()].some(port => !port.entering);
  Object.assign(box, {w: width + 2 * PAD, h: y + (leaves ? 0 : PAD)});
}

/** Rows of items by their longest way from the top, with a stop for each link in each row that it passes. */
function rowsOf(items, links) {
  const after = new Map(items.map(item => [item, []])), state = new Map(), sorted = [];
  for (const l of links) after.get(l.from).push(l);
  const entering = items.filter(item => item.entering), leaving = items.filter(item => item.isPort && !item.entering);
  for (const item of items) Object.assign(item, {above: [], below: [], row: entering.length && !item.entering ? 1 : 0});
  const visit = item => {
    state.set(item, "open");
    for (const l of after.get(item)) {
      l.upward = state.get(l.to) === "open"; // only where modules call each other in turn
      if (!state.has(l.to)) visit(l.to);
    }
    state.set(item, "done");
    sorted.unshift(item);
  };
  for (const item of items) if (!state.has(item)) visit(item);
  const downward = item => after.get(item).filter(l => !l.upward).map(l => l.to);
  for (const item of sorted) for (const next of downward(item)) next.row = Math.max(next.row, item.row + 1);
  const fed = new Set(items.flatMap(downward));
  for (const item of sorted.toReversed()) { // what nothing flows into stands right above where it is used
    const below = downward(item).map(next => next.row);
    if (!fed.has(item) && !item.isPort && below.length) item.row = Math.min(...below) - 1;
  }
  const inside = items.filter(item => !leaving.includes(item));
  for (const item of leaving) item.row = Math.max(...inside.map(other => other.row)) + 1;
  const used = [...new Set(items.map(item => item.row))].sort((a, b) => a - b);
  for (const item of items) item.row = used.indexOf(item.row);
  const rows = used.map((_, r) => items.filter(item => item.row === r));
  const stops = new Map();
  for (const l of links) {
    l.stops = [];
    if (l.upward) continue;
    let previous = l.from;
    for (let r = l.from.row + 1; r < l.to.row; r++) {
      const id = `${l.source.id} ${l.from.id} ${r}`;
      if (!stops.has(id)) {
        stops.set(id, {w: 8, h: 0, isStop: true, above: [], below: []});
        rows[r].push(stops.get(id));
        join(previous, stops.get(id), l);
      }
      l.stops.push(previous = stops.get(id));
    }
    join(previous, l.to, l);
  }
  return rows;
}

function join(upper, lower, l) {
  const offset = (item, entering) => item.open ? item.ports.get(portId(l.source, entering)).cx - item.w / 2 : 0;
  const weight = upper.isStop && lower.isStop ? 8 : l.source.leaf ?? l.source.members.every(i => cards[i].leaf) ? 0.05 : 1;
  const isFrom = input => input.node !== null && visible(input.node) === l.source;
  const slot = lower.node === undefined ? 0 : nodes[lower.node].inputs.findIndex(isFrom);
  const segment = {upper, lower, weight, slot, shift: offset(upper, false) - offset(lower, true)};
  upper.below.push(segment);
  lower.above.push(segment);
}

/** Sort each row by where its neighbours in the row above, then below, stand; keep the order with the fewest crossings. */
function order(rows) {
  const number = row => row.forEach((item, i) => Object.assign(item, {i, line: row}));
  rows.forEach(number);
  const crossings = () => rows.reduce((total, row) => {
    const segments = row.flatMap(item => item.below.map(s => [item.i, s.lower.i]));
    segments.forEach(([a, b], i) => { for (const [c, d] of segments.slice(i + 1)) if ((a - c) * (b - d) < 0) total++; });
    return total;
  }, 0);
  let best = rows.map(row => [...row]), fewest = crossings();
  for (let sweep = 0; sweep < 12 && fewest; sweep++) {
    for (const row of sweep % 2 ? rows : rows.toReversed()) {
      const at = item => {
        const near = sweep % 2 ? item.above.map(s => s.upper.i) : item.below.map(s => s.lower.i + s.slot / 8);
        return near.length ? mean(near) : item.i;
      };
      const keys = new Map(row.map(item => [item, at(item)]));
      row.sort((a, b) => keys.get(a) - keys.get(b) || a.i - b.i);
      number(row);
    }
    if (crossings() < fewest) { fewest = crossings(); best = rows.map(row => [...row]); }
  }
  rows.forEach((row, r) => { row.splice(0, Infinity, ...best[r]); number(row); });
}

/** Give each item its cx: near its neighbours' mean, by least squares under the order of its row and the room each needs. */
function place(rows) {
  for (const row of rows) settle(row, row.map(() => [0, 1]));
  for (let sweep = 0; sweep < 24; sweep++) {
    const side = sweep > 20 ? "both" : sweep % 2 ? "above" : "below";
    for (const row of side === "below" ? rows.toReversed() : rows) {
      settle(row, row.map(item => {
        let pull = 0, weight = 0;
        if (side !== "below") for (const s of item.above) { pull += s.weight * (s.upper.cx + s.shift); weight += s.weight; }
        if (side !== "above") for (const s of item.below) { pull += s.weight * (s.lower.cx - s.shift); weight += s.weight; }
        return weight ? [pull / weight, weight] : [item.cx, 0.01];
      }));
    }
  }
}

/** What follows one upon another, like the stops of a long edge, stands in one line where there is room. */
function straighten(rows) {
  const only = segments => { const main = segments.filter(s => s.weight >= 1); return main.length === 1 ? main[0] : null; };
  const seen = new Set();
  for (const first of rows.flat()) {
    if (seen.has(first)) continue;
    const chain = [[first, 0]];
    for (let next = only(first.below), shift = 0; next && only(next.lower.above); next = only(next.lower.below)) {
      shift += next.shift;
      chain.push([next.lower, shift]);
    }
    let low = -Infinity, high = Infinity;
    for (const [item, shift] of chain) {
      const [before, after] = [item.line[item.i - 1], item.line[item.i + 1]];
      if (before) low = Math.max(low, before.cx + (before.w + item.w) / 2 + SIDE - shift);
      if (after) high = Math.min(high, after.cx - (after.w + item.w) / 2 - SIDE - shift);
      seen.add(item);
    }
    const cx = clamp(mean(chain.map(([item, shift]) => item.cx - shift)), low, high);
    if (low <= high) for (const [item, shift] of chain) item.cx = cx + shift;
  }
}

function settle(row, wishes) {
  let room = 0;
  const blocks = [];
  row.forEach((item, i) => {
    if (i) room += (row[i - 1].w + item.w) / 2 + SIDE;
    let block = {wish: wishes[i][0] - room, weight: wishes[i][1], members: [[item, room]]};
    while (blocks.length && blocks.at(-1).wish > block.wish) { // too close: they move as one
      const before = blocks.pop(), weight = before.weight + block.weight;
      const wish = (before.wish * before.weight + block.wish * block.weight) / weight;
      block = {wish, weight, members: [...before.members, ...block.members]};
    }
    blocks.push(block);
  });
  for (const block of blocks) for (const [item, room] of block.members) item.cx = block.wish + room;
}

function locate(box, X, Y) {
  Object.assign(box, {X, Y});
  for (const child of box.children) {
    if (child.open) locate(child, X + child.x, Y + child.y);
    else Object.assign(child, {X: X + child.x, Y: Y + child.y});
  }
  for (const item of box.children) { // edges arrive side by side, in the order in which they come
    item.entries = item.open ? null : [...box.links.values()].filter(l => l.to === item).sort((a, b) => beside(a) - beside(b));
  }
}
const beside = l => (l.stops.at(-1) ?? l.from).cx;

/** An edge as vertical runs [x, top, bottom] through the rows, between which it bends. */
function runsOf(edge) {
  return edge.links.flatMap(({box, from, to, source, stops, ...l}) => {
    const out = from.open ? from.x + from.ports.get(portId(source, false)).cx : from.cx;
    let into = to.open ? to.x + to.ports.get(portId(source, true)).cx : to.cx;
    if (to.entries?.length > 1) {
      const n = to.entries.length, i = to.entries.findIndex(l => l.from === from && l.source === source);
      into += (i - (n - 1) / 2) * Math.min(26, (to.w - 40) / (n - 1));
    }
    const runs = [[out, from.isPort ? 0 : from.y + from.h, from.isPort ? from.y : from.bottom]];
    for (const stop of stops) runs.push([stop.cx, stop.top, stop.bottom]);
    runs.push([into, to.isPort ? to.y : to.top, to.isPort ? box.h : to.y]);
    return runs.map(([x, top, bottom]) => [x + box.X, top + box.Y, bottom + box.Y]);
  });
}

function curve(runs, shift) {
  const at = (x, y) => `${(x + shift).toFixed(1)} ${y.toFixed(1)}`;
  return runs.map(([x, top, bottom], i) => {
    const straight = bottom > top ? `L${at(x, bottom)}` : "";
    if (!i) return `M${at(x, top)}${straight}`;
    const [px, , py] = runs[i - 1], fall = top - py;
    const turn = fall ? `C${at(px, py + 0.85 * fall)} ${at(x, top - fall / 2)} ${at(x, top)}` : "";
    return turn + straight;
  }).join("");
}

// Drawing

let step = 0, timer = null, codeOpen = false;
const world = byId("world"), canvas = byId("canvas");

function render() {
  connect();
  arrange(root);
  locate(root, 0, 0);
  const layers = {back: [], lines: [], front: []};
  (function draw(box) {
    for (const item of box.children) {
      if (item.open) {
        layers.back.push(svg("rect", {class: "module", x: item.X, y: item.Y, width: item.w, height: item.h, rx: 10}));
        layers.front.push(heading(item));
        draw(item);
      } else layers.front.push(item.children ? closed(item) : card(item));
    }
  })(root);
  for (const edge of edges) {
    const runs = runsOf(edge);
    edge.forward = svg("path", {class: "forward", d: curve(runs, -3), "marker-end": "url(#down)"});
    edge.backward = svg("path", {class: "backward", d: curve(runs, 3), "marker-start": "url(#up)"});
    layers.lines.push(edge.forward, edge.backward);
  }
  for (const item of cards) if (visible(item.node) === item) {
    if (nodes[item.node].arrived.length > 1) {
      item.plus = svg("g", {class: "plus", transform: `translate(${item.X + item.w / 2 + 3} ${item.Y + item.h + 10})`},
        svg("circle", {r: 8}), svg("path", {d: "M-4 0H4M0 -4V4"}));
      layers.front.push(item.plus);
    }
    if (nodes[item.node].inputs.some(input => input.node === null && input.constant === null)) {
      layers.lines.push(svg("path", {class: "stub", d: `M${item.X + item.w - 16} ${item.Y}v-22`}));
    }
  }
  world.replaceChildren(...layers.back, ...layers.lines, ...layers.front, svg("g", {id: "shares"}));
  byId("doors").textContent = modules.some(box => !box.open) ? "open all" : "close all";
  byId("doors").hidden = !modules.length;
}

function activatable(item, label, act, ...children) {
  return item.element = svg("g", {
    transform: `translate(${item.X} ${item.Y})`, tabindex: 0, role: "button", "aria-label": label, onclick: act,
    ...(item.children ? {"data-group": item.group} : {"data-node": item.node}),
  }, children);
}

const line = (x, y, kind, content, end = false) => svg("text", {x, y, class: kind, "text-anchor": end && "end"}, content);

function card(item) {
  const i = item.node, node = nodes[i], shape = shapeOf(node.y), value = short(node.y, 28);
  const title = !item.leaf && node.name ? `${node.name} = ${node.op}` : nameOf(i);
  const prefix = item.parent === root ? "" : pathOf(item.parent.group) + ".", room = item.w - 34 - measure(shape, MONO);
  const inner = item.leaf && title.startsWith(prefix) ? title.slice(prefix.length) : title;
  const name = measure(inner, BOLD) > room && !item.leaf ? node.op : inner;
  item.g = line(34, 54, "value", "");
  const element = activatable(item, `${title}, step ${i + 1}`, () => go(i + 1),
    svg("rect", {class: "face", width: item.w, height: item.h, rx: item.leaf ? 16 : 7}),
    line(12, 20, "name", fitted(name, room, BOLD)), line(item.w - 12, 20, "shape", shape, true),
    line(12, 38, "sign forward", item.leaf ? "=" : "y"), line(34, 38, value ? "value" : "value faint", value ?? "not kept"),
    line(12, 54, "sign backward", "g"), item.g,
    svg("title", {}, `${title}  ${shape}\n${node.source || node.line || "a leaf"}`));
  element.classList.add("card", item.leaf ? "leaf" : "op");
  return element;
}

const countOf = box => {
  const leaves = box.members.filter(i => nodes[i].op === "leaf").length;
  const ops = box.members.length - leaves;
  return [ops && plural(ops, "op"), leaves && plural(leaves, "leaf", "leaves")].filter(Boolean).join(", ");
};

function closed(item) {
  const title = titleOf(item.group), kind = fitted(kindOf(item.group), item.w - 44 - measure(title, BOLD), MONO);
  item.bar = svg("rect", {class: "bar", x: 12, y: 53, height: 4, rx: 2, width: 0});
  const element = activatable(item, `${title}, closed`, () => toggle(item),
    svg("rect", {class: "behind", x: 6, y: 6, width: item.w, height: item.h - 6, rx: 9}),
    svg("rect", {class: "face", width: item.w, height: item.h - 6, rx: 9}),
    line(12, 20, "name", fitted("▸ " + title, item.w - 24, BOLD)), line(item.w - 12, 20, "shape", kind, true),
    line(12, 40, "shape", countOf(item)),
    svg("rect", {class: "track", x: 12, y: 53, width: item.w - 24, height: 4, rx: 2}), item.bar);
  element.classList.add("closed");
  return element;
}

function heading(item) {
  const kind = kindOf(item.group), title = "▾ " + titleOf(item.group);
  const wide = measure(title, BOLD);
  const element = activatable(item, `${titleOf(item.group)}, open`, () => toggle(item),
    svg("rect", {class: "face", x: 6, y: 5, width: wide + measure(kind, MONO) + 22, height: 22, rx: 6}),
    line(12, 21, "name", title), line(20 + wide, 21, "shape", kind));
  element.classList.add("heading");
  return element;
}

const arrivedAt = i => nodes[i].arrived.filter(([sender]) => (sender ?? i) < step).length;

/** Bring all that depends on the step up to date. */
function show() {
  const now = step - 1;
  document.body.dataset.step = step;
  for (const item of cards) if (visible(item.node) === item) {
    const i = item.node, {arrived, g} = nodes[i], count = arrivedAt(i), whole = count === arrived.length;
    const line = whole ? short(g, 28) : count ? `${count} of ${arrived.length} shares` : "–";
    if (item.g.textContent !== line) item.g.textContent = line;
    item.g.classList.toggle("faint", !whole);
    item.element.classList.toggle("now", i === now);
    item.element.classList.toggle("done", i < now);
    item.plus?.classList.toggle("on", count > 0);
  }
  for (const box of modules) if (!box.open && visible(box.members[0]) === box) {
    box.element.classList.toggle("now", box.members.includes(now));
    box.bar.setAttribute("width", (box.w - 24) * box.members.filter(i => i < step).length / box.members.length);
  }
  const labels = [];
  for (const edge of edges) {
    const sent = edge.inputs.filter(input => input.share !== null && input.v <= now);
    const fresh = sent.filter(input => input.v === now);
    edge.backward.classList.toggle("sent", sent.length > 0);
    edge.backward.classList.toggle("now", fresh.length > 0);
    if (fresh.length) labels.push(label(edge, fresh));
  }
  labels.sort((a, b) => a.y - b.y || a.x - b.x).forEach(({y, x, width}, i) => {
    const next = labels[i + 1];
    if (next && next.y - y < 18) next.x = Math.max(next.x, x + width + 4);
  });
  byId("shares").replaceChildren(...labels.map(({x, y, width, content}) => svg("g",
    {class: "share", transform: `translate(${x} ${y})`},
    svg("rect", {width, height: 18, rx: 9}), line(7, 13, "value", content))));
  byId("where").textContent = step ? `step ${step} of ${last}` : plural(last, "step");
  slide();
  byId("panel").replaceChildren(...(step ? about(now) : opening()));
  byId("panel").scrollTop = 0;
}

function label(edge, inputs) {
  const each = inputs.map(({argument, share}) => `${argument}: ${short(share, 24)}`);
  const content = each.length > 2 ? plural(each.length, "share") : each.join("  +  ");
  const width = measure(content, MONO) + 14;
  const path = edge.backward, start = path.getPointAtLength(0).y;
  let low = 0, high = path.getTotalLength();
  while (high - low > 1) { // the place 30 below where the share arrives
    const middle = (low + high) / 2;
    if (path.getPointAtLength(middle).y < start + 30) low = middle; else high = middle;
  }
  const {x, y} = path.getPointAtLength(low);
  return {x: x - width / 2, y: Math.round(y) - 9, width, content};
}

// The panel

const jump = i => html("button", {class: "jump", onclick: () => go(i + 1)}, nameOf(i), html("small", {}, ` step ${i + 1}`));

function table(numbers, shape) {
  const [rows, columns] = shape.slice(-2), digits = columns > 5 ? 3 : 4;
  if (shape.length === 2) {
    return html("div", {class: "scroll"}, html("table", {}, Array.from({length: rows}, (_, r) => html("tr", {},
      numbers.slice(r * columns, (r + 1) * columns).map(x => html("td", {}, text(x, digits)))))));
  }
  const size = numbers.length / shape[0];
  return html("div", {class: "slices"}, Array.from({length: shape[0]}, (_, i) => html("div", {},
    html("small", {}, `[${i}]`), table(numbers.slice(i * size, (i + 1) * size), shape.slice(1)))));
}

function numbersOf({numbers, shape}) {
  if (!numbers.length) return html("p", {class: "faint"}, "no elements");
  if (shape.length > 1) return table(numbers, shape);
  return html("p", {class: "mono"}, shape.length ? `[${numbers.map(x => text(x)).join(", ")}]` : text(numbers[0], 6));
}

function histogram({bins, min, max}) {
  const most = Math.max(...bins), zero = min < 0 && max > 0 ? 240 * -min / (max - min) : null;
  return html("div", {class: "histogram"},
    svg("svg", {viewBox: "0 0 240 40", preserveAspectRatio: "none"},
      bins.map((count, i) => count > 0
        && svg("rect", {x: i * 10 + 0.5, width: 9, y: 40 - Math.max(1, 40 * count / most), height: 40})),
      zero !== null && svg("line", {x1: zero, x2: zero, y1: 0, y2: 40})),
    html("div", {class: "ends"}, html("span", {}, text(min)), html("span", {}, text(max))));
}

function arrayOf(place, missing) {
  const array = arrays[place];
  if (array.numbers) return numbersOf(array);
  if (array.zeros === undefined) return html("p", {class: "faint"}, missing);
  const facts = [], constant = array.bins && array.min === array.max;
  if (constant) facts.push(`every ${array.not_finite ? "finite " : ""}element is ${text(array.min)}`);
  else if (array.bins) facts.push(`mean ${text(array.mean)}`, `std ${text(array.std)}`);
  if (array.zeros && !constant) facts.push(`${text(100 * array.zeros, 3)} % zeros`);
  if (array.not_finite) facts.push(`${array.not_finite.toLocaleString("en")} not finite`);
  return html("div", {}, array.bins && !constant ? histogram(array) : "", html("p", {class: "stats"}, facts.join("  ·  ")));
}

function row(kind, head, place, note, missing = "") {
  const facts = [`${arrays[place].dtype} ${shapeOf(place)}`, note].filter(Boolean).join(" · ");
  return html("div", {class: `row ${kind}`},
    html("div", {class: "head"}, html("span", {}, head), html("small", {}, facts)), arrayOf(place, missing));
}

function opening() {
  const leaves = nodes.filter(node => node.op === "leaf").length, value = short(nodes[0].y, 20) ?? "a number";
  const whole = (last + data.left_out).toLocaleString("en");
  const recorded = data.left_out ? `${whole} operations and leaves`
    : `${plural(last - leaves, "operation")} on ${plural(leaves, "leaf", "leaves")}`;
  const help = [["← →", "one step"], ["Shift ← →", "to the next box"], ["Home End", "first, last"], ["Space", "play"],
    ["F + −", "fit, zoom"], ["O", "open or close all"]];
  return [
    html("h2", {}, "Before the first step"),
    html("p", {}, `The forward pass is over. It made ${nodes[0].name || "the loss"} = ${value} and recorded ${recorded}: `
      + "leaves are the tensors that want a gradient."),
    nodes[0].source ? html("pre", {class: "source"}, nodes[0].source) : "",
    html("p", {}, "Backward starts from ∂L/∂L = 1 at the loss and goes from the newest operation to the oldest. Each "
      + "takes its gradient g = ∂L/∂y and sends to each of its inputs ∂L/∂input: its share. Where several arrive they add up; "
      + "no node's turn comes before all its shares have."),
    html("ul", {class: "legend"},
      html("li", {}, html("i", {class: "forward"}), "values y flow down"),
      html("li", {}, html("i", {class: "backward"}), "gradients g flow up"),
      html("li", {}, html("i", {class: "leaf"}), "leaves: here gradients stay, as .grad")),
    modules.length ? html("p", {}, "A module is a box: click it, or press Enter on it, to open and close it.") : "",
    data.left_out ? html("p", {class: "warning"}, `${plural(data.left_out, "older node")} of ${whole} are left out; `
      + "dotted lines lead to them. The numbers are those of the whole pass.") : "",
    data.hooks ? html("p", {class: "warning"}, "Hooks are registered on this graph. They were not run: "
      + "the gradients are those before any hook.") : "",
    html("dl", {class: "keys"}, help.map(([key, what]) => html("div", {}, html("dt", {}, key), html("dd", {}, what)))),
  ];
}

function about(i) {
  const node = nodes[i], leaf = node.op === "leaf", name = leaf ? node.name || "this leaf" : "y";
  const note = leaf ? "leaf" : node.name && `makes ${node.name}`;
  const made = "not kept: no derivative reads it", parts = [html("h2", {}, leaf ? name : node.op, html("small", {}, note))];
  const add = (...more) => parts.push(...more);
  if (!leaf) {
    const kind = node.group !== null && kindOf(node.group);
    const where = node.group !== null && `in ${pathOf(node.group)}${kind && ` (${kind})`}`;
    add(html("p", {class: "place"}, [where, node.settings].filter(Boolean).join("  ·  ")),
      html("div", {class: "source", title: node.line},
        node.source && html("pre", {}, node.source), html("small", {}, fileOf(node))),
      html("div", {class: "rule"}, node.rule));
    if (node.code) add(html("details", {open: codeOpen && "", ontoggle: event => { codeOpen = event.target.open; }},
      html("summary", {}, "in code"), html("pre", {}, node.code)));
  }
  add(html("h3", {class: "backward"}, "Arrives"));
  const [only, ...others] = node.arrived, from = sender => sender === null ? "a node left out" : jump(sender);
  if (others.length) {
    for (const [sender, share] of node.arrived) {
      const head = html("span", {}, "from ", from(sender));
      add(node.arrived.length <= 6 ? row("backward", head, share)
        : html("div", {class: "row head"}, head, html("span", {class: "mono"}, short(share, 24))));
    }
    add(html("p", {class: "adds"}, `⊕ ${node.arrived.length} shares arrived; they add up to`));
  }
  const origin = only && !others.length ? [" from ", from(only[0])] : [];
  add(row("backward", html("span", {}, `g = ∂L/∂${name}`, origin), node.g, only ? "" : "the seed, ∂L/∂L = 1"));
  if (leaf) add(html("p", {}, "Here the way ends: backward() adds g to this tensor's .grad."));
  const sends = node.inputs.filter(input => input.constant === null);
  if (sends.length) add(html("h3", {class: "backward"}, "Sends"));
  for (const input of sends) {
    const head = html("span", {}, `∂L/∂${input.argument} to `, from(input.node));
    if (input.share === null) add(html("div", {class: "row head"}, head, html("small", {}, "nothing")));
    else {
      head.append(html("small", {class: "adds"}, countAt(input.node)));
      add(row("backward", head, input.share));
    }
  }
  add(html("h3", {class: "forward"}, leaf ? "Value" : "Forward"));
  for (const input of node.inputs) {
    const place = input.constant ?? nodes[input.node]?.y, kept = input.saved ? "kept for the rule" : "";
    if (place === undefined) continue; // of a node left out
    const head = html("span", {}, `${input.argument} = `, input.constant === null ? jump(input.node) : "a constant");
    add(row("forward", head, place, kept, input.constant === null ? made : "not kept: the rule does not read it"));
  }
  add(row("forward", name, node.y, node.kept ? "kept for the rule" : "", made));
  return parts;
}

function countAt(i) {
  const total = nodes[i]?.arrived.length;
  return total > 1 ? ` ⊕ ${arrivedAt(i)} of ${total}` : "";
}

// Steps, time and keys

function go(to) {
  step = clamp(to, 0, last);
  show();
  reveal();
}

/** To the next step that happens in another box, past the inside of a closed module. */
function over(by) {
  let to = step + by;
  while (to > 0 && to < last && step > 0 && visible(to - 1) === visible(step - 1)) to += by;
  go(to);
}

function play(on) {
  clearInterval(timer);
  timer = null;
  document.body.classList.toggle("playing", on);
  if (!on) return;
  if (step === last) go(0);
  timer = setInterval(() => { go(step + 1); if (step === last) play(false); }, clamp(40000 / last, 150, 1100));
}

const timeline = byId("timeline");

function bands() {
  const kinds = nodes.map((node, i) => {
    let item = cards[i];
    while (item.parent !== root) item = item.parent;
    return last <= 24 ? nameOf(i) : node.op === "leaf" ? "leaves" : item.children ? titleOf(item.group) : "ops";
  });
  const runs = [["", 1, false]];
  kinds.forEach((kind, i) => {
    if (last > 24 && runs.at(-1)[0] === kind) runs.at(-1)[1]++;
    else runs.push([kind, 1, nodes[i].op === "leaf"]);
  });
  const band = ([kind, count, leaf]) => html("span", {class: leaf && "leaf", style: `flex: ${count} 1 0`, title: kind},
    html("b", {}, kind));
  timeline.append(...runs.map(band), html("i", {id: "past"}), html("i", {id: "cursor"}));
  const pick = event => {
    const {left, width} = timeline.getBoundingClientRect();
    if (event.buttons) go(Math.floor((event.clientX - left) / width * (last + 1)));
  };
  timeline.addEventListener("pointerdown", event => { timeline.setPointerCapture(event.pointerId); pick(event); });
  timeline.addEventListener("pointermove", pick);
  timeline.setAttribute("aria-valuemax", last);
}

function slide() {
  byId("past").style.width = `${100 * step / (last + 1)}%`;
  Object.assign(byId("cursor").style, {left: `${100 * step / (last + 1)}%`, width: `max(3px, ${100 / (last + 1)}%)`});
  timeline.setAttribute("aria-valuenow", step);
  timeline.setAttribute("aria-valuetext", step ? `step ${step}, ${nameOf(step - 1)}` : "before the first step");
}

const keys = {
  ArrowRight: event => event.shiftKey ? over(1) : go(step + 1),
  ArrowLeft: event => event.shiftKey ? over(-1) : go(step - 1),
  Home: () => go(0), End: () => go(last), " ": () => play(!timer),
  f: fit, "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8),
  o: () => {
    const open = modules.some(box => !box.open);
    for (const box of modules) box.open = open;
    render();
    show();
    start();
  },
};
document.addEventListener("keydown", event => {
  const {target, key} = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inside = target.closest("#canvas [role=button]");
  if (key === "Enter" && inside) return inside.dispatchEvent(new MouseEvent("click"));
  if (!(key in keys) || (key === " " && target.closest("button, summary"))) return;
  event.preventDefault();
  if (key !== " ") play(false);
  keys[key](event);
});
for (const button of document.querySelectorAll("[data-key]")) {
  button.addEventListener("click", event => { if (button.dataset.key !== " ") play(false); keys[button.dataset.key](event); });
}

function toggle(box) {
  const {X, Y, w} = box;
  box.open = !box.open;
  render();
  show();
  move(view.k, view.x + (X + w / 2 - box.X - box.w / 2) * view.k, view.y + (Y - box.Y) * view.k);
  box.element.focus({preventScroll: true});
}

// The view

const view = {k: 1, x: 0, y: 0, moved: false};

function move(k, x, y, smooth = false) {
  Object.assign(view, {k, x, y});
  world.classList.toggle("smooth", smooth);
  world.style.transform = `translate(${x}px, ${y}px) scale(${k})`;
}

function zoom(by, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const k = clamp(view.k * by, 0.05, 3), f = k / view.k;
  view.moved = true;
  move(k, x - (x - view.x) * f, y - (y - view.y) * f);
}

function fit() {
  const {clientWidth: W} = canvas, H = canvas.clientHeight - 52, k = Math.min(W / root.w, H / root.h, 1.25);
  view.moved = false;
  move(k, (W - k * root.w) / 2, (H - k * root.h) / 2 + 8);
}

/** All of the graph when that can be read, else the loss and what is around it. */
function start() {
  fit();
  if (view.k < 0.6) {
    move(0.9, 0, 0);
    reveal(true);
  }
}

/** Move the view, when it must, to where the step happens. */
function reveal(centre = false) {
  const {clientWidth: W, clientHeight: H} = canvas, item = visible(Math.max(step - 1, 0)), {k, x, y} = view;
  const cx = (item.X + item.w / 2) * k, cy = (item.Y + item.h / 2) * k;
  if (!centre && x >= 0 && y >= 0 && x + root.w * k <= W && y + root.h * k <= H) return;
  const outside = (at, size, total) => at - size / 2 * k < 24 || at + size / 2 * k > total - 24 - 60 * k;
  const within = (at, size, total) => size * k <= total ? (total - size * k) / 2 : clamp(at, total - size * k, 0);
  const dx = centre || outside(cx + x, item.w, W);
  const dy = centre || cy + y - item.h / 2 * k < 110 * k || outside(cy + y, item.h, H);
  if (dx || dy) move(k, dx ? within(W / 2 - cx, root.w, W) : x, dy ? within(H * 0.62 - cy, root.h, H - 52) : y, !centre);
}

canvas.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY);
}, {passive: false});
let held = null;
canvas.addEventListener("pointerdown", event => {
  held = {X: event.clientX, Y: event.clientY, x: view.x, y: view.y, far: false};
});
canvas.addEventListener("pointermove", event => {
  if (!held || !event.buttons) return;
  const dx = event.clientX - held.X, dy = event.clientY - held.Y;
  if (!held.far && Math.hypot(dx, dy) < 4) return; // a click, not a drag
  if (!held.far) canvas.setPointerCapture(event.pointerId);
  held.far = view.moved = true;
  move(view.k, held.x + dx, held.y + dy);
});
canvas.addEventListener("click", event => {
  if (held?.far) event.stopPropagation();
  held = null;
}, true);

byId("title").textContent = document.title;
byId("about").textContent = [nodes[0].name && `${nodes[0].name} = ${short(nodes[0].y, 20) ?? "?"}`,
  nodes[0].line && fileOf(nodes[0]), data.left_out && `${plural(data.left_out, "older node")} left out`]
  .filter(Boolean).join(" · ");
bands();
render();
start();
show();
new ResizeObserver(() => { if (!view.moved) start(); }).observe(canvas);
