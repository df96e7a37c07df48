// The pure half of core.js: node --test tests/js
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

// Not imported by its path: without a package.json older versions of node take a .js file for CommonJS.
const source = readFileSync(new URL("../../nbdyn/widgets/static/core.js", import.meta.url), "utf8");
const { count, decode, digest, domain, extent, label, logTicks, nearest, scale, show, ticks } = await import(
  `data:text/javascript,${encodeURIComponent(source)}`
);

/** A frame as Python packs it, starting at an odd byte as a view into a message may. */
function packed(series, more = {}) {
  const blocks = series.flatMap((s) => [
    Int32Array.from([...s.first, ...s.final, ...s.nans]),
    Float32Array.from([...s.low, ...s.high, ...s.mean]),
  ]);
  const bytes = new Uint8Array(3 + blocks.reduce((sum, b) => sum + b.byteLength, 0));
  let at = 3;
  for (const block of blocks) {
    bytes.set(new Uint8Array(block.buffer), at);
    at += block.byteLength;
  }
  const meta = series.map((s) => ({ name: "loss", log: false, origin: 0, nan: 0, last: 1, n: 9, ...s.meta, bins: s.low.length }));
  return { meta: { n: 9, first: 0, last: 8, status: "live", ...more, series: meta }, data: new DataView(bytes.buffer, 3) };
}

const LOSS = { first: [0, 2, 8], final: [1, 5, 8], nans: [0, 1, 0], low: [1, NaN, 0.5], high: [3, NaN, 0.75], mean: [2, NaN, 0.6] };

test("decode is the reverse of Cockpit._pack", () => {
  const [a, b] = decode(packed([{ ...LOSS, meta: { origin: 2 ** 30 } }, LOSS])).series;
  assert.deepEqual([...a.first], [2 ** 30, 2 ** 30 + 2, 2 ** 30 + 8]);
  assert.deepEqual([...b.final], [1, 5, 8]);
  assert.deepEqual([...b.nans], [0, 1, 0]);
  assert.deepEqual([...b.high], [3, NaN, 0.75]);
  assert.equal(b.name, "loss");
});

test("extent leaves out NaN, and on a log scale what is not positive", () => {
  const [s] = decode(packed([LOSS])).series;
  assert.deepEqual(extent(s), [0.5, 3]);
  assert.deepEqual(extent({ ...s, log: true, low: Float32Array.of(0, -1, 0.25) }), [0.25, 3]);
  assert.equal(extent({ ...s, low: Float32Array.of(), high: Float32Array.of(), mean: Float32Array.of() }), null);
});

test("a domain is never empty and holds the extent", () => {
  for (const [lo, hi, log] of [[0, 0], [2, 2], [-3, -3], [1, 2], [0.01, 2], [1e-3, 1e3, true], [5, 5, true]]) {
    const [a, b] = domain([lo, hi], log);
    assert.ok(a < b && a <= lo && b >= hi, `${lo} ${hi}`);
    assert.ok(!log || a > 0);
  }
  assert.equal(domain([0.1, 2], false)[0], 0, "a loss that has fallen far is shown down to zero");
});

test("scale maps ends to ends and inverts", () => {
  const y = scale([0.01, 100], [200, 0], true);
  assert.deepEqual([y(0.01), y(1), y(100)].map(Math.round), [200, 100, 0]);
  assert.ok(Math.abs(y.invert(50) - 10) < 1e-9);
  const x = scale([10, 20], [0, 100]);
  assert.equal(x.invert(x(17)), 17);
  assert.equal(scale([5, 5], [0, 100])(5), 0);
});

test("ticks are round and inside", () => {
  assert.deepEqual(ticks(0, 1, 4), [0, 0.5, 1]);
  assert.deepEqual(ticks(0, 879, 8), [0, 200, 400, 600, 800]);
  assert.deepEqual(ticks(0, 3, 8, true), [0, 1, 2, 3], "steps have no fractions");
  assert.deepEqual(ticks(7, 7, 4), [7]);
  assert.deepEqual(logTicks(0.002, 300, 10), [0.01, 0.1, 1, 10, 100]);
  assert.ok(logTicks(1e-9, 1e9, 3).length <= 4);
  assert.deepEqual(logTicks(0.15, 0.6, 3), [0.2, 0.5]);
  assert.deepEqual(logTicks(0.011, 0.0235, 2.5), [0.015, 0.02], "one mark alone says nothing about the scale");
});

test("numbers for people", () => {
  assert.equal(show(0.031234), "0.0312");
  assert.equal(show(-2), "−2.00");
  assert.equal(show(1.5e-7), "1.50·10⁻⁷");
  assert.equal(show(2.5e12), "2.50·10¹²");
  assert.equal(show(12345), "12345");
  assert.equal(show(null), "NaN");
  assert.equal(show(0), "0");
  assert.equal(label(1e-3, true), "10⁻³");
  assert.equal(label(5e-4, true), "5·10⁻⁴");
  assert.equal(label(100, true), "100");
  assert.equal(label(0.5), "0.5");
  assert.equal(count(1234567), "1\u202f234\u202f567");
});

test("nearest bin, also in the gaps between bins", () => {
  const [s] = decode(packed([LOSS])).series;
  assert.deepEqual([-5, 0, 1, 2, 5, 6, 7, 8, 99].map((t) => nearest(s, t)), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
  assert.equal(nearest({ ...s, first: Int32Array.of() }, 3), -1);
});

test("digest tells counts and extents", () => {
  const { series, ...rest } = digest(decode(packed([LOSS])));
  assert.deepEqual(rest, { n: 9, first: 0, last: 8, status: "live" });
  assert.deepEqual(series.loss, { n: 9, bins: 3, extent: [0.5, 3], last: 1, nan: 0 });
});
