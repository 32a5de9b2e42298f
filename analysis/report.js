"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [rows, cols] = data.shape, $ = id => document.getElementById(id);
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.bytes), c => c.charCodeAt(0));
  return new {u1: Uint8Array, i4: Int32Array, f4: Float32Array, f8: Float64Array}[packed.dtype](bytes.buffer);
}
const unpacked = packs => Object.fromEntries(Object.entries(packs).map(([name, packed]) => [name, unpack(packed)]));
let arrays = unpacked(data.arrays);
const traces = data.traces && {step: unpack(data.traces.step), losses: unpack(data.traces.losses), row: data.traces.row_stride, col: data.traces.col_stride};
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const show = v => Number.isNaN(v) ? "not finite" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : +v.toPrecision(5) + "";

// ---- the map: each layer is painted once into a cols x rows picture and drawn scaled
const painted = () => data.layers.map(layer => {
  const picture = document.createElement("canvas");
  picture.width = cols; picture.height = rows;
  const context = picture.getContext("2d"), image = context.createImageData(cols, rows), index = arrays[layer.array];
  for (let row = 0; row < rows; row++) for (let col = 0; col < cols; col++) {
    const colour = layer.colours[index[row * cols + col]], at = ((rows - 1 - row) * cols + col) * 4;
    if (colour) { image.data[at] = colour[0]; image.data[at + 1] = colour[1]; image.data[at + 2] = colour[2]; image.data[at + 3] = 255; }
  }
  context.putImageData(image, 0, 0);
  return picture;
});
let layers = painted();
const map = $("map"), pad = {left: 66, right: 8, top: 8, bottom: 46};
let layer = 0, view = {x: 0, y: 0, scale: 1}, hover = null, chosen = [];  // view: left and top of the picture in widths of the map

function geometry() {
  const width = map.clientWidth, side = Math.max(width - pad.left - pad.right, 50), tall = Math.min(side, 620);
  return {width, height: tall + pad.top + pad.bottom, w: side, h: tall};
}
function place(axis, fraction) {  // value of an axis at a fraction of its drawn extent
  const at = axis.from + fraction * (axis.to - axis.from);
  return axis.log ? 10 ** at : at;
}
function ticks(axis, low, high) {  // fractions of the whole extent between low and high, and what they say
  const from = axis.from + low * (axis.to - axis.from), to = axis.from + high * (axis.to - axis.from), made = [];
  if (axis.log && to - from > 1.2) {
    const step = Math.ceil((to - from) / 7);
    for (let p = Math.ceil(from / step) * step; p <= to; p += step) made.push([p, "1e" + p]);
  } else if (axis.log && to - from > .5) {
    for (let p = Math.floor(from); p <= to; p++) for (const m of [1, 2, 5]) { const at = p + Math.log10(m); if (at >= from && at <= to) made.push([at, show(m * 10 ** p)]); }
  } else {
    const a = axis.log ? 10 ** from : from, b = axis.log ? 10 ** to : to, raw = (b - a) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * (raw / power >= 5 ? 5 : raw / power >= 2 ? 2 : 1), digits = Math.min(Math.max(Math.ceil(Math.log10(Math.abs(b) / step)) + 1, 3), 15);
    for (let v = Math.ceil(a / step) * step; v <= b; v += step) made.push([axis.log ? Math.log10(v) : v, String(+v.toPrecision(digits))]);
  }
  return made.map(([p, text]) => [(p - axis.from) / (axis.to - axis.from), text]);
}
function drawMap() {
  const g = geometry(), ratio = devicePixelRatio || 1, c = map.getContext("2d");
  map.style.height = g.height + "px"; map.width = g.width * ratio; map.height = g.height * ratio;
  c.scale(ratio, ratio);
  c.save(); c.beginPath(); c.rect(pad.left, pad.top, g.w, g.h); c.clip();
  c.fillStyle = ink("--line"); c.fillRect(pad.left, pad.top, g.w, g.h);
  c.imageSmoothingEnabled = false;
  const sx = g.w * view.scale, sy = g.h * view.scale, x0 = pad.left - view.x * sx, y0 = pad.top - view.y * sy;
  c.drawImage(layers[layer], x0, y0, sx, sy);
  const cw = sx / cols, ch = sy / rows;
  if ($("edge").getAttribute("aria-pressed") === "true") {
    c.lineWidth = 1.4; c.strokeStyle = data.layers[layer].line; c.beginPath();
    const side = arrays.side;
    for (let row = 0; row < rows; row++) for (let col = 0; col < cols; col++) {
      const here = side[row * cols + col]; if (here === 2) continue;
      const x = x0 + col * cw, y = y0 + (rows - 1 - row) * ch;
      if (col + 1 < cols && side[row * cols + col + 1] === 1 - here) { c.moveTo(x + cw, y); c.lineTo(x + cw, y + ch); }
      if (row + 1 < rows && side[(row + 1) * cols + col] === 1 - here) { c.moveTo(x, y); c.lineTo(x + cw, y); }
    }
    c.stroke();
  }
  for (const cell of [...chosen, ...(hover ? [hover] : [])]) {
    c.lineWidth = 2; c.strokeStyle = cell.colour || "#000";
    const x = x0 + cell.col * cw, y = y0 + (rows - 1 - cell.row) * ch;
    c.strokeRect(x - 1, y - 1, cw + 2, ch + 2); c.strokeStyle = "#fff"; c.lineWidth = 1; c.strokeRect(x - 2.5, y - 2.5, cw + 5, ch + 5);
  }
  c.restore();
  c.strokeStyle = ink("--soft"); c.lineWidth = 1; c.strokeRect(pad.left, pad.top, g.w, g.h);
  c.fillStyle = ink("--soft"); c.font = "12px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "top";
  for (const [f, text] of ticks(data.x, view.x, view.x + 1 / view.scale)) { const x = x0 + f * sx; c.fillRect(x, pad.top + g.h, 1, 4); c.fillText(text, x, pad.top + g.h + 7); }
  c.textAlign = "right"; c.textBaseline = "middle";
  for (const [f, text] of ticks(data.y, 1 - view.y - 1 / view.scale, 1 - view.y)) { const y = y0 + (1 - f) * sy; c.fillRect(pad.left - 4, y, 4, 1); c.fillText(text, pad.left - 7, y); }
  c.fillStyle = ink("--ink"); c.font = "600 13px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "bottom";
  c.fillText(data.x.name, pad.left + g.w / 2, g.height - 2);
  c.save(); c.translate(13, pad.top + g.h / 2); c.rotate(-Math.PI / 2); c.textBaseline = "middle"; c.fillText(data.y.name, 0, 0); c.restore();
}
function cellAt(event) {
  const g = geometry(), box = map.getBoundingClientRect();
  const fx = ((event.clientX - box.left - pad.left) / g.w) / view.scale + view.x, fy = ((event.clientY - box.top - pad.top) / g.h) / view.scale + view.y;
  const col = Math.floor(fx * cols), row = rows - 1 - Math.floor(fy * rows);
  return fx >= 0 && fy >= 0 && col >= 0 && col < cols && row >= 0 && row < rows ? {row, col} : null;
}
function clampView() {
  view.scale = Math.min(Math.max(view.scale, 1), Math.max(rows, cols));
  const most = 1 - 1 / view.scale;
  view.x = Math.min(Math.max(view.x, 0), most); view.y = Math.min(Math.max(view.y, 0), most);
}
map.addEventListener("wheel", event => {
  event.preventDefault();
  const g = geometry(), box = map.getBoundingClientRect();
  const u = (event.clientX - box.left - pad.left) / g.w, v = (event.clientY - box.top - pad.top) / g.h, before = view.scale;
  view.scale *= Math.exp(-event.deltaY / 400); clampView();
  view.x += u / before - u / view.scale; view.y += v / before - v / view.scale; clampView(); drawMap();
}, {passive: false});
let drag = null;
map.addEventListener("pointerdown", event => { drag = {x: event.clientX, y: event.clientY, view: {...view}, moved: false}; map.setPointerCapture(event.pointerId); });
map.addEventListener("pointermove", event => {
  if (drag) {
    const g = geometry(), dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    drag.moved = drag.moved || Math.hypot(dx, dy) > 4;
    if (drag.moved) { view.x = drag.view.x - dx / g.w / view.scale; view.y = drag.view.y - dy / g.h / view.scale; clampView(); drawMap(); }
    return;
  }
  const cell = cellAt(event);
  if (cell && (!hover || cell.row !== hover.row || cell.col !== hover.col)) { hover = cell; describe(cell); drawMap(); drawTrace(); }
});
map.addEventListener("pointerup", event => { if (drag && !drag.moved) { const cell = cellAt(event); if (cell) choose(cell); } drag = null; });
map.addEventListener("pointercancel", () => { drag = null; });
// the keys do what the mouse does: arrows move the chosen cell, Enter keeps it, + and - zoom around it, 0 shows all
map.addEventListener("keydown", event => {
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key], zoom = {"+": 1.5, "-": 1 / 1.5}[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || !(step || zoom || event.key === "Enter" || event.key === "0")) return;
  event.preventDefault();
  hover = hover || {row: rows >> 1, col: cols >> 1};
  if (step) hover = {row: Math.min(Math.max(hover.row + step[0], 0), rows - 1), col: Math.min(Math.max(hover.col + step[1], 0), cols - 1)};
  if (event.key === "Enter") { choose(hover); return; }
  if (event.key === "0") view = {x: 0, y: 0, scale: 1};
  if (zoom || step) {
    if (zoom) view.scale *= zoom;
    clampView();
    const u = (hover.col + .5) / cols, v = 1 - (hover.row + .5) / rows, wide = 1 / view.scale;
    if (u < view.x || u > view.x + wide || zoom) view.x = u - wide / 2;
    if (v < view.y || v > view.y + wide || zoom) view.y = v - wide / 2;
    clampView();
  }
  describe(hover); drawMap(); drawTrace();
});
map.addEventListener("dblclick", () => { view = {x: 0, y: 0, scale: 1}; drawMap(); });

// ---- one cell
function describe({row, col}) {
  const at = row * cols + col, list = $("cell");
  $("where").textContent = `Row ${row * data.stride}, column ${col * data.stride}`;
  list.replaceChildren();
  const add = (name, value) => { const dt = document.createElement("dt"), dd = document.createElement("dd"); dt.textContent = name; dd.textContent = value; list.append(dt, dd); };
  add(data.y.name, show(data.y.values[row])); add(data.x.name, show(data.x.values[col]));
  add("label", data.labels[arrays.codes[at]]);
  for (const [name, array] of data.values) add(name, name === "first non-finite step" && arrays[array][at] < 0 ? "none" : show(arrays[array][at]));
  $("replay").textContent = `uv run engine/replay.py --store ${data.store} --row ${row * data.stride} --col ${col * data.stride}${data.replicate}`;
}
const palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
function choose(cell) {
  const same = chosen.findIndex(c => c.row === cell.row && c.col === cell.col);
  if (same >= 0) chosen.splice(same, 1);
  else { if (chosen.length === palette.length) chosen.shift(); chosen.push({...cell, colour: palette.find(p => !chosen.some(c => c.colour === p))}); }
  describe(cell); drawMap(); drawTrace();
}
function traceOf(cell) {
  if (!traces) return null;
  const row = Math.round(cell.row / traces.row), col = Math.round(cell.col / traces.col), wide = Math.ceil(cols / traces.col), tall = Math.ceil(rows / traces.row), n = traces.step.length;
  const at = (Math.min(row, tall - 1) * wide + Math.min(col, wide - 1)) * n;
  return traces.losses.subarray(at, at + n);
}
function drawTrace() {
  const canvas = $("trace"), ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = 190, c = canvas.getContext("2d");
  canvas.style.height = height + "px"; canvas.width = width * ratio; canvas.height = height * ratio; c.scale(ratio, ratio);
  c.font = "12px system-ui, sans-serif"; c.fillStyle = ink("--soft");
  if (!traces) { canvas.style.height = "24px"; canvas.height = 24 * ratio; c.scale(ratio, ratio); c.fillStyle = ink("--soft"); c.font = "12px system-ui, sans-serif"; c.fillText(data.live ? "Losses by step are in the report of the stored sweep." : "The store holds no loss traces (--trace off).", 4, 16); return; }
  const lines = [...chosen.map(cell => [cell, cell.colour]), ...(hover ? [[hover, ink("--ink")]] : [])].map(([cell, colour]) => [traceOf(cell), colour]);
  let low = Infinity, high = -Infinity, last = 1;
  for (const [losses] of lines) losses.forEach((v, i) => { if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); last = Math.max(last, traces.step[i]); } });
  if (!Number.isFinite(low)) { c.fillText(lines.length ? "No finite loss." : "Point at a cell to see its losses.", 4, 20); return; }
  if (high - low < 1e-9) { high += .5; low -= .5; }
  const log = low > 0 && high / low > 50, f = v => log ? Math.log(v) : v, left = 44, right = 6, top = 18, bottom = 26;
  const X = s => left + s / last * (width - left - right), Y = v => top + (f(high) - f(v)) / (f(high) - f(low)) * (height - top - bottom);
  c.textAlign = "right"; c.textBaseline = "middle";
  for (let i = 0; i <= 3; i++) { const v = log ? Math.exp(f(low) + i / 3 * (f(high) - f(low))) : low + i / 3 * (high - low); c.fillText(+v.toPrecision(3), left - 6, Y(v)); c.globalAlpha = .25; c.fillRect(left, Y(v), width - left - right, 1); c.globalAlpha = 1; }
  c.textAlign = "center"; c.textBaseline = "top"; for (let i = 0; i <= 3; i++) c.fillText(Math.round(last * i / 3), X(last * i / 3) - (i === 3 ? 8 : 0), height - bottom + 5);
  c.textAlign = "left"; c.fillText(log ? "loss (log) by step" : "loss by step", left, 0);
  for (const [losses, colour] of lines) {
    c.strokeStyle = colour; c.lineWidth = 1.5; c.beginPath(); let open = false;
    losses.forEach((v, i) => { if (Number.isFinite(v)) { open ? c.lineTo(X(traces.step[i]), Y(v)) : c.moveTo(X(traces.step[i]), Y(v)); open = true; } else open = false; });
    c.stroke();
  }
}

// ---- tabs and legend
function selectLayer(index) {
  layer = index;
  [...$("tabs").children].forEach((button, i) => { if (button.id !== "edge") button.setAttribute("aria-pressed", i === index); });
  const legend = $("legend"); legend.replaceChildren();
  const chosenLayer = data.layers[index];
  for (const [text, colour] of chosenLayer.legend) { const span = document.createElement("span"), box = document.createElement("i"); box.style.background = colour; span.append(box, text); legend.append(span); }
  if (chosenLayer.ramp) { const scale = document.createElement("span"), ramp = document.createElement("b"); scale.className = "scale"; ramp.style.background = `linear-gradient(90deg, ${chosenLayer.ramp.colours.join(",")})`; scale.append(chosenLayer.ramp.from, ramp, chosenLayer.ramp.to); legend.append(scale); }
  drawMap();
}
data.layers.forEach((entry, i) => { const button = document.createElement("button"); button.textContent = entry.name; button.addEventListener("click", () => selectLayer(i)); $("tabs").append(button); });
const edge = document.createElement("button");
edge.id = "edge"; edge.textContent = "boundary"; edge.setAttribute("aria-pressed", rows * cols <= 65536);
edge.addEventListener("click", () => { edge.setAttribute("aria-pressed", edge.getAttribute("aria-pressed") !== "true"); drawMap(); });
$("tabs").append(edge);
// #layer=2&cells=3,4;5,6&zoom=4 opens with that layer and those cells
const asked = new URLSearchParams(location.hash.slice(1));
for (const pair of (asked.get("cells") || "").split(";").filter(Boolean)) { const [row, col] = pair.split(",").map(Number); if (row >= 0 && row < rows && col >= 0 && col < cols) choose({row, col}); }
if (!chosen.length) describe({row: rows >> 1, col: cols >> 1});
if (asked.has("zoom")) { view = {x: .5, y: .5, scale: +asked.get("zoom") || 1}; view.x -= .5 / view.scale; view.y -= .5 / view.scale; clampView(); }
selectLayer(Math.min(+asked.get("layer") || 0, layers.length - 1));
drawTrace();
addEventListener("resize", () => { drawMap(); drawTrace(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawMap(); drawTrace(); });
// ---- of a running sweep: ask every second for what is new
function take(fresh) {
  Object.assign(data, {layers: fresh.layers, cells: fresh.cells, stamp: fresh.stamp});
  arrays = unpacked(fresh.arrays); layers = painted();
  $("answer-text").innerHTML = fresh.sections.answer; $("labels-text").innerHTML = fresh.sections.labels;
  selectLayer(layer);
  if (hover) describe(hover);
}
async function look() {
  let text = "";
  try {
    const answer = await fetch("map.json?since=" + encodeURIComponent(data.stamp || ""));
    if (answer.status === 200) take(await answer.json());
    text = `${data.cells[0].toLocaleString("en")} of ${data.cells[1].toLocaleString("en")} cells`;
  } catch (error) { text = "The server has ended; this is the last it said."; }
  if ($("state").textContent !== text) $("state").textContent = text;
  setTimeout(look, 1000);
}
if (data.live) look();
document.body.dataset.ready = "yes";
