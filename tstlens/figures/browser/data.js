// Decoding: the JSON block of the page, and the packed arrays in it, each once and on demand.
const DATA = JSON.parse(document.getElementById("data").textContent);

const KINDS = {f4: Float32Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array, u1: Uint8Array};
const decoded = new Map();

function array(packed) {
  if (!decoded.has(packed)) {
    const text = atob(packed.b);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    decoded.set(packed, new KINDS[packed.t](bytes.buffer));
  }
  return decoded.get(packed);
}

function column(name) {
  const packed = DATA.table[name];
  if (!packed) return null;
  return packed.codes ? array(packed.codes) : array(packed);
}

function word(name, latent) {
  const packed = DATA.table[name];
  if (!packed) return null;
  const code = array(packed.codes)[latent];
  return code === 65535 ? null : packed.words[code];
}

// One channel of a shown series in the units of the data; NaN where it is padding.
function rawSeries(shown, channel) {
  const raw = DATA.raw, whole = array(raw.values), out = new Float64Array(DATA.time);
  const start = (shown * DATA.channels + channel) * DATA.time;
  for (let t = 0; t < DATA.time; t++) {
    const value = whole[start + t];
    out[t] = value === raw.padding ? NaN : raw.low[channel] + (value + 32500) * raw.step[channel];
  }
  return out;
}

let paddedSlots = null;
function isPadded(slot) {
  if (!paddedSlots) paddedSlots = new Set(array(DATA.heat.padded));
  return paddedSlots.has(slot);
}

// Activations of a latent as shares of its largest, over all shown slots.
function activations(latent) {
  const heat = DATA.heat, start = array(heat.start), slot = array(heat.slot), share = array(heat.share);
  const out = new Float32Array(DATA.series.length * DATA.rows * DATA.pos);
  for (let i = start[latent]; i < start[latent + 1]; i++) out[slot[i]] = (share[i] - 1) / 254 + 1e-6;
  return out;
}

function windowsOf(latent) {
  const w = DATA.windows, start = array(w.start), slot = array(w.slot), strength = array(w.activation);
  const out = [];
  for (let i = start[latent]; i < start[latent + 1]; i++) {
    const row = Math.floor(slot[i] / DATA.pos), pos = slot[i] % DATA.pos;
    const shown = Math.floor(row / DATA.rows), channel = DATA.rows > 1 ? row % DATA.rows : null;
    out.push({
      shown, pos, row, activation: strength[i], series: DATA.series[shown],
      channel, channels: channel === null ? [...Array(DATA.channels).keys()] : [channel], span: DATA.spans[pos],
      label: DATA.labels ? DATA.classes[DATA.labels[shown]] : null,
    });
  }
  return out;
}

function number(value, signed) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size < 5e-4) text = value.toExponential(1);
  else text = value.toFixed(size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4);
  if (signed && value > 0) text = "+" + text;
  return text.replace(/-/g, "−");
}

function percent(value) {
  if (Number.isNaN(value)) return "–";
  const share = 100 * value;
  return (share >= 10 ? share.toFixed(0) : share >= 1 ? share.toFixed(1) : share.toFixed(2)) + " %";
}

function chance(value) {
  if (value === null || Number.isNaN(value)) return "–";
  return value < 0.001 ? "< 0.001" : value.toFixed(3);
}

// An element with attributes and children; text always goes in as text.
function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "text", "title", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
