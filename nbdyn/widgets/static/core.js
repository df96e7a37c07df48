// What every nbdyn widget shares: numbers, scales, the frame on the wire, and the colours of the page.
// Plain ESM; Python joins this file with one widget's file (see _assets.py). The first half is pure and tested by node.

/**
 * @typedef {{name: string, label: string, color: string, log: boolean, n: number, bins: number, origin: number,
 *   width: number, last: number | null, nan: number}} Meta
 * @typedef {Meta & {first: Int32Array, final: Int32Array, nans: Int32Array, low: Float32Array, high: Float32Array,
 *   mean: Float32Array}} Series
 * @typedef {{title: string, source: string, status: string, first: number, last: number, n: number,
 *   series: Series[]}} Frame
 */

/**
 * Read a frame as Python packed it: for each series three rows of int32 (first step, last step, NaN count; steps count
 * from the origin), then three of float32 (low, high, mean), each `bins` long, little-endian.
 * @param {{meta: any, data: DataView}} wire
 * @returns {Frame}
 */
export function decode({ meta, data }) {
  let at = data.byteOffset;
  /** @param {any} Type @param {number} bins */
  const row = (Type, bins) => {
    const size = 4 * bins;
    const values = new Type(data.buffer.slice(at, at + size)); // a copy: the view may start at any byte
    at += size;
    return values;
  };
  const series = meta.series.map((/** @type {Meta} */ s) => {
    const [first, final, nans] = [0, 0, 0].map(() => row(Int32Array, s.bins));
    const [low, high, mean] = [0, 0, 0].map(() => row(Float32Array, s.bins));
    return { ...s, first: first.map((t) => t + s.origin), final: final.map((t) => t + s.origin), nans, low, high, mean };
  });
  return { ...meta, series };
}

/** Least and greatest finite value, on a log scale of the positive ones only; null where there is none.
 * @param {Series} s @returns {[number, number] | null} */
export function extent(s) {
  let [lo, hi] = [Infinity, -Infinity];
  for (const values of [s.low, s.high, s.mean]) {
    for (const v of values) {
      if (!Number.isFinite(v) || (s.log && v <= 0)) continue;
      if (v < lo) lo = v;
      if (v > hi) hi = v;
    }
  }
  return lo <= hi ? [lo, hi] : null;
}

/** The extent with room around it, so that a constant is a line in the middle and not a division by zero.
 * @param {[number, number]} ends @param {boolean} log @returns {[number, number]} */
export function domain([lo, hi], log) {
  if (log) return lo === hi ? [lo / 2, hi * 2] : [lo / 1.15, hi * 1.15];
  if (lo === hi) return lo === 0 ? [-1, 1] : lo > 0 ? [0, 2 * lo] : [2 * lo, 0];
  if (lo > 0 && lo < 0.4 * hi) return [0, hi * 1.04];
  const room = (hi - lo) * 0.06;
  return [lo - room, hi + room];
}

/** A map from values to pixels, with `invert`.
 * @param {[number, number]} from @param {[number, number]} to @param {boolean} [log] */
export function scale(from, to, log = false) {
  const f = log ? Math.log10 : (/** @type {number} */ v) => v;
  const [a, b] = [f(from[0]), f(from[1])];
  const slope = b === a ? 0 : (to[1] - to[0]) / (b - a);
  const map = (/** @type {number} */ v) => to[0] + (f(v) - a) * slope;
  map.invert = (/** @type {number} */ p) => {
    const v = slope === 0 ? a : a + (p - to[0]) / slope;
    return log ? 10 ** v : v;
  };
  return map;
}

/** Round values 1, 2, 5 times a power of ten inside the domain, about `count` of them.
 * @param {number} lo @param {number} hi @param {number} count @param {boolean} [whole] @returns {number[]} */
export function ticks(lo, hi, count, whole = false) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999) ?? 10 * power;
  if (whole) step = Math.max(1, Math.round(step));
  const from = Math.ceil(lo / step - 1e-9);
  const to = Math.floor(hi / step + 1e-9);
  return Array.from({ length: Math.max(0, to - from + 1) }, (_, i) => Number(((from + i) * step).toPrecision(12)));
}

/** Powers of ten inside the domain, thinned to about `count`; 1-2-5 values, or any round ones,
 * where the domain holds less than two.
 * @param {number} lo @param {number} hi @param {number} count @returns {number[]} */
export function logTicks(lo, hi, count) {
  const [a, b] = [Math.ceil(Math.log10(lo) - 1e-9), Math.floor(Math.log10(hi) + 1e-9)];
  if (b - a >= 1) {
    const every = Math.max(1, Math.ceil((b - a + 1) / count));
    const powers = [];
    for (let p = b; p >= a; p -= every) powers.unshift(Number(`1e${p}`));
    return powers;
  }
  const values = [];
  for (let p = a - 1; p <= b + 1; p++) {
    for (const m of [1, 2, 5]) {
      const v = Number(`${m}e${p}`);
      if (v >= lo && v <= hi) values.push(v);
    }
  }
  return values.length > 1 ? values : ticks(lo, hi, count);
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A number as a mantissa times a power of ten. @param {number} v @param {number} digits @returns {string} */
function scientific(v, digits) {
  const [mantissa, power] = v.toExponential(digits - 1).replaceAll("-", "−").split("e");
  const raised = [...power.replace("+", "")].map((c) => (c === "−" ? "⁻" : SUPERSCRIPTS[Number(c)])).join("");
  return `${mantissa}·10${raised}`;
}

/** A number for people: `digits` significant digits, a power of ten where it is very large or small.
 * @param {number | null} v @param {number} [digits] @returns {string} */
export function show(v, digits = 3) {
  if (v === null || !Number.isFinite(v)) return "NaN";
  const size = Math.abs(v);
  if (v === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return scientific(v, digits);
  return (size >= 1000 ? v.toFixed(0) : v.toPrecision(digits)).replace("-", "−");
}

/** A tick label: as short as it can be. @param {number} v @param {boolean} [log] @returns {string} */
export function label(v, log = false) {
  const size = Math.abs(v);
  if (v !== 0 && (size < 1e-3 || size >= 1e5 || (log && (size < 0.01 || size > 100)))) {
    return scientific(v, 3).replace(/\.?0+·/, "·").replace(/^(−?)1·/, "$1");
  }
  return String(Number(v.toPrecision(6))).replace("-", "−");
}

/** A count with thin spaces between thousands. @param {number} n @returns {string} */
export const count = (n) => String(n).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");

/** Index of the bin whose steps lie nearest to a step; -1 where there are none.
 * @param {Series} s @param {number} step @returns {number} */
export function nearest(s, step) {
  let [lo, hi] = [0, s.first.length - 1];
  if (hi < 0) return -1;
  while (lo < hi) {
    const middle = (lo + hi) >> 1;
    if (s.final[middle] < step) lo = middle + 1;
    else hi = middle;
  }
  if (lo > 0 && step < s.first[lo] && step - s.final[lo - 1] < s.first[lo] - step) return lo - 1;
  return lo;
}

/** What is drawn, in a few numbers, for tests and for the curious: counts and extents, never pixels.
 * @param {Frame} frame */
export function digest(frame) {
  return {
    n: frame.n,
    first: frame.first,
    last: frame.last,
    status: frame.status,
    series: Object.fromEntries(
      frame.series.map((s) => [s.name, { n: s.n, bins: s.bins, extent: extent(s), last: s.last, nan: s.nan }]),
    ),
  };
}

// From here on the page is needed.

/** The page's colours and font as they are now, for canvas. @param {HTMLElement} el */
export function theme(el) {
  const style = getComputedStyle(el);
  const get = (/** @type {string} */ name) => style.getPropertyValue(`--nbdyn-${name}`).trim();
  return {
    fg: get("fg"), muted: get("muted"), faint: get("faint"), bg: get("bg"), alarm: get("alarm"),
    font: style.fontFamily || "sans-serif",
  };
}

/** Call back whenever the theme of the page may have changed. @param {() => void} callback @param {AbortSignal} signal */
export function onTheme(callback, signal) {
  const observer = new MutationObserver(callback);
  for (const target of [document.documentElement, document.body]) observer.observe(target, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", callback, { signal });
  signal.addEventListener("abort", () => observer.disconnect());
}

/** Make an element. @param {string} tag @param {Record<string, string>} [attributes] @param {(Node | string)[]} children */
export function h(tag, attributes = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
  el.append(...children);
  return el;
}

/** Run `callback` at most once a picture frame. @param {() => void} callback @param {AbortSignal} signal */
export function perFrame(callback, signal) {
  let waiting = 0;
  signal.addEventListener("abort", () => cancelAnimationFrame(waiting));
  return () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(callback);
  };
}
