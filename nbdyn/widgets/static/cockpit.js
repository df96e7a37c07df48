// The cockpit: small multiples over one step axis, the band from least to greatest value with the mean as a line.

import {
  count, decode, digest, domain, extent, h, label, logTicks, nearest, onTheme, perFrame, scale, show, theme, ticks,
} from "./core.js";

/** @typedef {import("./core.js").Frame} Frame @typedef {import("./core.js").Series} Series */

const LEFT = 52, RIGHT = 12, HEADER = 24, GAP = 12, AXIS = 26;
const heightOf = (/** @type {number} */ i) => (i === 0 ? 124 : 66);
const totalHeight = (/** @type {Frame} */ f) =>
  f.series.reduce((sum, _, i) => sum + HEADER + heightOf(i), 0) + GAP * (f.series.length - 1) + AXIS;

/** What a badge says and why, for each status of a run. @type {Record<string, [string, string]>} */
const BADGES = {
  live: ["live", "training: new steps arrive at most five times a second"],
  recording: ["recording", "another process is recording this run; open it again to see more steps"],
  complete: ["complete", "the recording was closed"],
  interrupted: ["interrupted", "an exception or an interrupt ended the training; every step up to it is recorded"],
  killed: ["killed", "the recording process ended without closing; every step shown is recorded"],
  stopped: ["stopped", "the recording stopped before the training did"],
};

/**
 * Draw all panels.
 * @param {CanvasRenderingContext2D} ctx @param {Frame} frame @param {number} width
 * @param {ReturnType<typeof theme>} colours @param {number | null} cursor a step, or null
 */
function draw(ctx, frame, width, colours, cursor) {
  const right = width - RIGHT;
  const steps = scale([frame.first, Math.max(frame.last, frame.first + 1)], [LEFT, right]);
  const marks = frame.n ? ticks(frame.first, frame.last, Math.max(2, Math.min(8, (right - LEFT) / 80)), true) : [];
  const bottom = totalHeight(frame) - AXIS;
  const font = (/** @type {number} */ px, weight = 400) => (ctx.font = `${weight} ${px}px ${colours.font}`);
  /** @param {string} s @param {number} x @param {number} y @param {string} ink @param {CanvasTextAlign} align */
  const text = (s, x, y, ink, align = "left") => {
    ctx.fillStyle = ink;
    ctx.textAlign = align;
    ctx.fillText(s, x, y);
  };
  ctx.textBaseline = "alphabetic";
  let y = 0;
  frame.series.forEach((s, i) => {
    const at = cursor === null ? -1 : nearest(s, cursor);
    if (cursor !== null) {
      ctx.globalAlpha = 0.5;
      ctx.fillStyle = colours.muted;
      ctx.fillRect(steps(cursor) - 0.5, y + HEADER, 1, heightOf(i));
      ctx.globalAlpha = 1;
    }
    font(12);
    ctx.fillStyle = s.color;
    ctx.fillRect(LEFT, y + 11, 10, 2);
    text(s.label, LEFT + 16, y + 16, colours.muted);
    const [value, remark] = header(s, cursor, at);
    font(12, 600);
    text(value, right, y + 16, value === "NaN" ? colours.alarm : colours.fg, "right");
    const used = ctx.measureText(value).width;
    font(11);
    text(remark, right - used - (used ? 10 : 0), y + 16, remark.endsWith("NaN") ? colours.alarm : colours.muted, "right");
    plot(ctx, s, steps, y + HEADER, heightOf(i), right, colours, marks, font);
    if (at >= 0) dot(ctx, s, at, steps, y + HEADER, heightOf(i), colours);
    y += HEADER + heightOf(i) + GAP;
  });
  font(11);
  for (const t of marks) text(count(t), steps(t), bottom + 17, colours.muted, "center");
  if (cursor !== null) cursorLabel(ctx, frame, cursor, steps, bottom, right, colours);
}

/** The words above a panel at the right: the last value, or the range under the cursor; and a remark before it.
 * @param {Series} s @param {number | null} cursor @param {number} at @returns {[string, string]} */
function header(s, cursor, at) {
  if (!s.n) return ["", ""];
  if (cursor === null || at < 0) return [show(s.last), s.nan ? `${count(s.nan)} NaN` : ""];
  const [low, high] = [show(s.low[at]), show(s.high[at])];
  if (s.nans[at]) return [low === "NaN" ? low : `${low} – ${high}`, `${s.nans[at]} NaN`];
  const away = cursor < s.first[at] - 0.5 || cursor >= s.final[at] + 0.5; // a quantity measured at some steps only
  return [low === high ? low : `${low} – ${high}`, away ? `at ${count(s.final[at])}` : ""];
}

/**
 * One panel: gridlines with their numbers, band, line, NaN marks.
 * @param {CanvasRenderingContext2D} ctx @param {Series} s @param {any} steps @param {number} top
 * @param {number} height @param {number} right @param {any} colours @param {number[]} marks @param {any} font
 */
function plot(ctx, s, steps, top, height, right, colours, marks, font) {
  const ends = extent(s);
  const line = (/** @type {number[]} */ ...p) => {
    ctx.beginPath();
    ctx.moveTo(p[0], p[1]);
    ctx.lineTo(p[2], p[3]);
    ctx.stroke();
  };
  ctx.lineWidth = 1;
  ctx.strokeStyle = colours.faint;
  ctx.globalAlpha = 0.45;
  for (const t of marks) line(Math.round(steps(t)) + 0.5, top, Math.round(steps(t)) + 0.5, top + height);
  ctx.globalAlpha = 1;
  font(10.5);
  ctx.fillStyle = colours.muted;
  if (ends === null) {
    line(LEFT, top + height - 0.5, right, top + height - 0.5);
    ctx.textAlign = "center";
    ctx.fillText(s.n ? "NaN at every step, or not recorded" : "not recorded", (LEFT + right) / 2, top + height / 2 + 4);
  } else {
    const [lo, hi] = domain(ends, s.log);
    const y = scale([lo, hi], [top + height, top], s.log);
    ctx.textAlign = "right";
    for (const v of s.log ? logTicks(lo, hi, height / 26) : ticks(lo, hi, height / 30)) {
      line(LEFT, Math.round(y(v)) + 0.5, right, Math.round(y(v)) + 0.5);
      ctx.fillText(label(v, s.log), LEFT - 8, y(v) + 3.5);
    }
    curves(ctx, s, steps, (/** @type {number} */ v) => (s.log && v <= 0 ? top + height : y(v)));
  }
  ctx.fillStyle = colours.alarm;
  if (ends) s.nans.forEach((n, i) => n && ctx.fillRect(steps(middle(s, i)) - 0.75, top, 1.5, 7));
}

const middle = (/** @type {Series} */ s, /** @type {number} */ i) => (s.first[i] + s.final[i]) / 2;

/** Band and line, broken where a bin holds no finite value; a lone bin is a dot.
 * @param {CanvasRenderingContext2D} ctx @param {Series} s @param {any} x @param {any} y */
function curves(ctx, s, x, y) {
  /** @type {number[][]} */
  const pieces = [[]];
  s.mean.forEach((v, i) => {
    if (Number.isFinite(v)) pieces[pieces.length - 1].push(i);
    else pieces.push([]);
  });
  ctx.fillStyle = ctx.strokeStyle = s.color;
  ctx.lineJoin = "round";
  for (const piece of pieces.filter((p) => p.length)) {
    ctx.beginPath();
    for (const i of piece) ctx.lineTo(x(middle(s, i)), y(s.high[i]));
    for (const i of [...piece].reverse()) ctx.lineTo(x(middle(s, i)), y(s.low[i]));
    ctx.globalAlpha = 0.26;
    ctx.fill();
    ctx.globalAlpha = 0.35;
    ctx.lineWidth = 0.75;
    ctx.stroke(); // so that a spike one bin wide is still seen
    ctx.globalAlpha = 1;
    ctx.beginPath();
    for (const i of piece) ctx.lineTo(x(middle(s, i)), y(s.mean[i]));
    ctx.lineWidth = 1.25;
    ctx.stroke();
    if (piece.length === 1) {
      ctx.beginPath();
      ctx.arc(x(middle(s, piece[0])), y(s.mean[piece[0]]), 1.75, 0, 7);
      ctx.fill();
    }
  }
}

/** A dot on the mean at the cursor.
 * @param {CanvasRenderingContext2D} ctx @param {Series} s @param {number} at @param {any} steps @param {number} top
 * @param {number} height @param {any} colours */
function dot(ctx, s, at, steps, top, height, colours) {
  const x = steps(middle(s, at));
  const ends = extent(s);
  if (ends === null || !Number.isFinite(s.mean[at]) || (s.log && s.mean[at] <= 0)) return;
  ctx.beginPath();
  ctx.arc(x, scale(domain(ends, s.log), [top + height, top], s.log)(s.mean[at]), 3.5, 0, 7);
  ctx.fillStyle = s.color;
  ctx.fill();
  ctx.lineWidth = 1.5;
  ctx.strokeStyle = colours.bg;
  ctx.stroke();
}

/** The steps under the cursor, on the axis, over whatever tick label stands there.
 * @param {CanvasRenderingContext2D} ctx @param {Frame} frame @param {number} cursor @param {any} steps
 * @param {number} bottom @param {number} right @param {any} colours */
function cursorLabel(ctx, frame, cursor, steps, bottom, right, colours) {
  const words = stepsAt(frame, cursor);
  ctx.font = `600 11px ${colours.font}`;
  const width = ctx.measureText(words).width + 14;
  const x = Math.min(Math.max(steps(cursor), LEFT + width / 2), right - width / 2);
  ctx.fillStyle = colours.fg;
  ctx.beginPath();
  ctx.roundRect(x - width / 2, bottom + 4, width, 19, 4);
  ctx.fill();
  ctx.fillStyle = colours.bg;
  ctx.textAlign = "center";
  ctx.fillText(words, x, bottom + 17);
}

/** One sentence for people who hear the page: the last values, or those under the cursor.
 * @param {Frame} frame @param {number | null} cursor @returns {string} */
function describe(frame, cursor) {
  const shown = frame.series.filter((s) => s.n);
  const values = shown.map((s) => {
    const [value, remark] = header(s, cursor, cursor === null ? -1 : nearest(s, cursor));
    return `${s.label} ${value}${remark && ` (${remark})`}`;
  });
  const reach = !frame.n ? "no steps yet" : cursor === null ? `steps ${frame.first} to ${frame.last}` : stepsAt(frame, cursor);
  return [`cockpit of ${frame.title}, ${frame.status}, ${reach}`, ...values].join("; ");
}

/** The steps of the bin under the cursor. @param {Frame} frame @param {number} cursor @returns {string} */
function stepsAt(frame, cursor) {
  const s = main(frame);
  const at = nearest(s, cursor);
  const [a, b] = [s.first[at], s.final[at]];
  return a === b ? `step ${count(a)}` : `steps ${count(a)}–${count(b)}`;
}

/** The series whose bins the cursor goes by: the first that was recorded. @param {Frame} frame */
const main = (frame) => frame.series.find((s) => s.n) ?? frame.series[0];

/** "min–max of 880 steps, 2 in a bin": what the band is. @param {Frame} frame @returns {string} */
function reduction(frame) {
  const width = Math.max(1, ...frame.series.filter((s) => s.n).map((s) => s.width));
  if (!frame.n) return "waiting for the first step";
  return `min–max of ${count(frame.n)} steps` + (width > 1 ? `, ${count(width)} in a bin; line: mean` : "");
}

/** Save what is seen as a PNG, with title, status and background.
 * @param {Frame} frame @param {number} width @param {ReturnType<typeof theme>} colours */
function download(frame, width, colours) {
  const [pad, head, foot] = [16, 30, 22];
  const canvas = document.createElement("canvas");
  const size = [width + 2 * pad, totalHeight(frame) + 2 * pad + head + foot];
  [canvas.width, canvas.height] = size.map((v) => 2 * v);
  const ctx = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  ctx.scale(2, 2);
  ctx.fillStyle = colours.bg || "white";
  ctx.fillRect(0, 0, size[0], size[1]);
  ctx.translate(pad, pad);
  ctx.font = `600 14px ${colours.font}`;
  ctx.fillStyle = colours.fg;
  ctx.fillText(`${frame.title} · ${frame.status}`, LEFT, 14);
  ctx.font = `400 11px ${colours.font}`;
  ctx.fillStyle = colours.muted;
  ctx.fillText(reduction(frame), LEFT, size[1] - 2 * pad);
  ctx.translate(0, head);
  draw(ctx, frame, width, colours, null);
  const link = document.createElement("a");
  link.download = `${frame.title.replace(/[^\w.-]+/g, "-")}-cockpit.png`;
  link.href = canvas.toDataURL("image/png");
  link.click();
}

/** The elements of a view. */
function build() {
  const canvas = /** @type {HTMLCanvasElement} */ (
    h("canvas", { role: "img", tabindex: "0", title: "point, or use the arrow keys, to read the values of a step" })
  );
  const parts = {
    title: h("strong"),
    reach: h("span", { class: "nbdyn-muted nbdyn-reach" }),
    badge: h("span", { class: "nbdyn-badge", role: "status" }),
    save: h("button", { type: "button", title: "save as a PNG picture", "aria-label": "save as PNG" }, "PNG"),
    reduction: h("span"),
    source: h("span"),
    error: h("pre", { class: "nbdyn-error", role: "alert", hidden: "" }),
    canvas,
  };
  const head = h("header", {}, parts.title, parts.reach, h("i"), parts.badge, parts.save);
  const foot = h("footer", {}, parts.reduction, h("i"), parts.source);
  return { root: h("div", { class: "nbdyn nbdyn-cockpit" }, head, parts.error, canvas, foot), ...parts };
}

/** Write the words around the canvas.
 * @param {ReturnType<typeof build>} view @param {Frame} frame @param {number | null} cursor */
function caption(view, frame, cursor) {
  view.title.textContent = frame.title;
  view.reach.textContent = frame.n ? `steps ${count(frame.first)}–${count(frame.last)}` : "";
  const [word, why] = BADGES[frame.status] ?? [frame.status, ""];
  if (view.badge.textContent !== word) view.badge.textContent = word;
  view.badge.title = why;
  view.badge.dataset.status = frame.status;
  view.reduction.textContent = reduction(frame);
  view.source.textContent = frame.source;
  view.canvas.setAttribute("aria-label", describe(frame, cursor));
  view.root.dataset.digest = JSON.stringify(digest(frame));
}

/** The middle of the bin nearest to a step, so that one line stands for one bin. @param {Frame} frame @param {number} step */
function snap(frame, step) {
  const s = main(frame);
  const at = nearest(s, step);
  return at < 0 ? step : middle(s, at);
}

/** @param {{model: any, el: HTMLElement}} context */
function render({ model, el }) {
  const stop = new AbortController();
  const { signal } = stop;
  const view = build();
  const { root, canvas } = view;
  /** @type {Frame} */
  let frame = decode(model.get("wire"));
  /** @type {number | null} */
  let cursor = null;
  el.append(root);

  const paint = () => {
    const width = root.clientWidth;
    if (!width) return; // not on the page yet: the ResizeObserver calls again when it is
    const [height, fine] = [totalHeight(frame), devicePixelRatio || 1];
    canvas.style.height = `${height}px`;
    [canvas.width, canvas.height] = [Math.round(width * fine), Math.round(height * fine)];
    const ctx = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    ctx.scale(fine, fine);
    caption(view, frame, cursor);
    draw(ctx, frame, width, theme(root), cursor);
  };
  const complain = (/** @type {string} */ message) => {
    view.error.textContent = message;
    view.error.hidden = !message;
  };
  const paintOrComplain = () => {
    try {
      paint();
    } catch (error) {
      complain(String(error));
    }
  };
  const redraw = perFrame(paintOrComplain, signal);
  const move = (/** @type {number | null} */ step) => {
    cursor = step === null ? null : snap(frame, step);
    redraw();
  };

  const onFrame = () => {
    frame = decode(model.get("wire"));
    redraw();
  };
  const onError = () => complain(model.get("error"));
  model.on("change:wire", onFrame);
  model.on("change:error", onError);
  canvas.addEventListener("pointermove", (event) => {
    const ends = /** @type {[number, number]} */ ([frame.first, Math.max(frame.last, frame.first + 1)]);
    if (frame.n) move(scale([LEFT, root.clientWidth - RIGHT], ends)(event.offsetX));
  }, { signal });
  canvas.addEventListener("pointerleave", () => move(null), { signal });
  canvas.addEventListener("keydown", (event) => {
    const bin = Math.max(1, frame.series[0].width) * (event.shiftKey ? 20 : 1);
    const way = { ArrowLeft: -bin, ArrowRight: bin }[event.key];
    if (way === undefined && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation(); // else the notebook takes the key
    move(way === undefined ? null : (cursor ?? (way > 0 ? frame.first : frame.last)) + way);
  }, { signal });
  view.save.addEventListener("click", () => download(frame, root.clientWidth, theme(root)), { signal });
  // Not by way of redraw: this runs before the page is painted, so a view made anew never shows empty.
  const resized = new ResizeObserver(paintOrComplain);
  resized.observe(root);
  onTheme(redraw, signal);
  onError();
  canvas.style.height = `${totalHeight(frame)}px`;
  return () => {
    stop.abort();
    resized.disconnect();
    model.off("change:wire", onFrame);
    model.off("change:error", onError);
  };
}

export default { render };
