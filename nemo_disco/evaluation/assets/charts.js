// Line charts in plain SVG, independent of runs and metrics: each chart is a card made from a list of series.
"use strict";

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const SMOOTH_OVER = 30; // the running median's window is 1 / SMOOTH_OVER of a curve, if that is at least two points

function node(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function shape(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG_NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function canvas(width, height, label) {
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
}

function gridLines(ticks, toY, left, right) {
  return ticks.flatMap((y) => [
    shape("line", { x1: left, x2: right, y1: toY(y), y2: toY(y), class: "grid" }),
    shape("text", { x: left - 7, y: toY(y) + 4, "text-anchor": "end" }, formatNumber(y)),
  ]);
}

function formatNumber(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-3)
    return value.toExponential(Math.abs(Number(value.toPrecision(1)) - value) < size * 1e-6 ? 0 : 1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// A median, since a mean would spread single spikes over the window.
function runningMedian(values, window) {
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values
      .slice(Math.max(0, i - window + 1), i + 1)
      .filter((v) => v !== null)
      .sort((a, b) => a - b);
    return (near[(near.length - 1) >> 1] + near[near.length >> 1]) / 2;
  });
}

// The range of the vertical axis, and the number of values above it (spikes that would flatten the rest).
function verticalRange(values, spec) {
  if (spec.range) return { low: spec.range[0], high: spec.range[1], above: 0 };
  const sorted = Float64Array.from(values).sort();
  let low = sorted[0],
    high = sorted[sorted.length - 1],
    above = 0;
  const usual = sorted[Math.floor(sorted.length * 0.98)],
    middle = sorted[sorted.length >> 1];
  if (sorted.length > 50 && high - middle > 6 * (usual - middle) && usual > middle) {
    high = usual + (usual - middle);
    above = sorted.length - sorted.findIndex((v) => v > high);
  }
  if (spec.fromZero && low > 0) low = 0;
  for (const rule of spec.rules || []) {
    low = Math.min(low, rule.y);
    high = Math.max(high, rule.y);
  }
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
    low -= 0.5 * (Math.abs(low) || 1);
    high += 0.5 * (Math.abs(high) || 1);
  }
  const margin = (high - low) * 0.06;
  return { low: spec.fromZero && low === 0 ? 0 : low - margin, high: high + margin, above };
}

// SVG path data of a curve, with gaps at missing values.
function linePath(xs, ys, toX, toY) {
  let d = "",
    penDown = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || ys[i] === undefined) {
      penDown = false;
      continue;
    }
    d += `${penDown ? "L" : "M"}${toX(xs[i]).toFixed(1)} ${toY(ys[i]).toFixed(1)}`;
    penDown = true;
  }
  return d;
}

// SVG path data of the area between two curves.
function bandPath(xs, low, high, toX, toY) {
  const indices = xs.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
  const upper = indices.map((i) => `${toX(xs[i]).toFixed(1)} ${toY(high[i]).toFixed(1)}`);
  const lower = indices.reverse().map((i) => `${toX(xs[i]).toFixed(1)} ${toY(low[i]).toFixed(1)}`);
  return indices.length ? `M${upper.join("L")}L${lower.join("L")}Z` : "";
}

// spec: {title, help, range, fromZero, rules: [{y, label, color}], series: [...]}; a rule is a horizontal line.
// series: {label, color, x, y, low, high, points, ticks}; low and high: edges of a band around the curve;
// points: true draws a dot at each value (for few values); ticks: values of x that are marked below the plot.
class LineChart {
  static all = new Set();
  static width = 430;
  static height = 214;

  constructor(host, spec) {
    this.spec = spec;
    this.card = node("div", { class: "chart" }, node("h3", {}, spec.title));
    this.help = node("p", { class: "quiet" });
    this.plot = node("div");
    this.tip = node("div", { class: "tip", hidden: "" });
    this.card.append(this.help, this.plot, this.tip);
    host.append(this.card);
    LineChart.all.add(this);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.draw();
  }

  draw() {
    this.shown = this.spec.series.filter((s) => !hiddenSeries.has(s.label));
    const values = this.shown
      .flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])])
      .filter((v) => v !== null && v !== undefined);
    if (!values.length) {
      this.box = null;
      this.plot.replaceChildren(node("p", { class: "empty" }, "nothing to show"));
      return;
    }
    const { above } = this.measure(values);
    const { width, height, top, bottom } = this.box;
    const picture = canvas(width, height, this.spec.title);
    this.drawFrame(picture);
    this.shown.forEach((series, i) => this.drawSeries(picture, series, bottom + 4 + 6 * i));
    this.cross = shape("line", { y1: top, y2: bottom, class: "cross", visibility: "hidden" });
    picture.append(this.cross);
    picture.addEventListener("pointermove", (event) => LineChart.pointAll(this.toStep(event.offsetX)));
    picture.addEventListener("pointerleave", () => LineChart.pointAll(null));
    this.help.textContent = [this.spec.help, above ? `${above} spikes above the frame` : ""].filter(Boolean).join("; ");
    this.plot.replaceChildren(picture);
  }

  // Set the frame in pixels (box), the axes' ranges and the maps between them; returns the number of spikes above.
  measure(values) {
    const width = this.plot.clientWidth || LineChart.width;
    const height = LineChart.height;
    const rug = this.shown.some((s) => s.ticks) ? 6 + 6 * this.shown.length : 0;
    this.box = { width, height, left: 52, right: width - 10, top: 8, bottom: height - 20 - rug };
    const { left, right, top, bottom } = this.box;
    const { low, high, above } = verticalRange(values, this.spec);
    const steps = this.shown.flatMap((s) => s.x);
    let first = steps.reduce((a, b) => Math.min(a, b));
    let last = steps.reduce((a, b) => Math.max(a, b));
    if (first === last) [first, last] = [first - 1, last + 1];
    this.range = { low, high, first, last };
    this.toX = (x) => left + ((x - first) / (last - first)) * (right - left);
    this.toStep = (pixel) => first + ((pixel - left) / (right - left)) * (last - first);
    this.toY = (y) => bottom - ((Math.min(Math.max(y, low), high) - low) / (high - low)) * (bottom - top);
    return { above };
  }

  drawFrame(picture) {
    const { width, height, left, right } = this.box;
    const { low, high, first, last } = this.range;
    picture.append(...gridLines(niceTicks(low, high, 4), this.toY, left, right));
    for (const x of niceTicks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger)) {
      picture.append(shape("text", { x: this.toX(x), y: height - 5, "text-anchor": "middle" }, x.toLocaleString("en")));
    }
    // Labels side by side, so that those of neighbouring rules do not overlap.
    for (const [i, { y, label, color }] of (this.spec.rules || []).entries()) {
      const height = this.toY(y);
      const style = color ? `stroke: ${color}` : "";
      picture.append(
        shape("line", { x1: left, x2: right, y1: height, y2: height, class: "rule", style }),
        shape("text", { x: right - 72 * i, y: height - 4, "text-anchor": "end", class: "limit" }, label),
      );
    }
  }

  drawSeries(picture, series, rugY) {
    const { x, y, low, high, color } = series;
    const { toX, toY } = this;
    const window = series.points ? 1 : Math.max(1, Math.floor(x.length / SMOOTH_OVER));
    const smooth = (values) => (window > 1 ? runningMedian(values, window) : values);
    const line = (values, style) =>
      shape("path", { d: linePath(x, values, toX, toY), class: "line", stroke: color, ...style });
    if (low) {
      const d = bandPath(x, smooth(low), smooth(high), toX, toY);
      picture.append(shape("path", { d, fill: color, opacity: 0.16 }));
    }
    if (window > 1) picture.append(line(y, { "stroke-width": 1, opacity: 0.3 }));
    picture.append(line(smooth(y), { "stroke-width": 1.8 }));
    if (series.points || x.length === 1) {
      const measured = x.map((_, i) => i).filter((i) => y[i] !== null);
      picture.append(...measured.map((i) => shape("circle", { cx: toX(x[i]), cy: toY(y[i]), r: 3, fill: color })));
    }
    for (const tick of series.ticks || []) {
      picture.append(shape("rect", { x: toX(tick) - 0.75, y: rugY, width: 1.5, height: 5, fill: color }));
    }
  }

  // Show the same step's values in every chart; hide them if step is null.
  static pointAll(step) {
    for (const chart of LineChart.all) if (chart.card.isConnected) chart.point(step);
  }

  point(step) {
    if (!this.box || step === null) {
      this.tip.hidden = true;
      this.cross?.setAttribute("visibility", "hidden");
      return;
    }
    const lines = [];
    let shownStep = null;
    for (const series of this.shown) {
      let nearest = -1;
      series.x.forEach((x, i) => {
        if (series.y[i] !== null && (nearest < 0 || Math.abs(x - step) < Math.abs(series.x[nearest] - step)))
          nearest = i;
      });
      if (nearest < 0) continue;
      shownStep = series.x[nearest];
      const interval =
        series.low && series.low[nearest] !== null
          ? ` [${formatNumber(series.low[nearest])}, ${formatNumber(series.high[nearest])}]`
          : "";
      lines.push(
        node(
          "div",
          {},
          node("i", { class: "chip", style: `background: ${series.color}` }),
          `${formatNumber(series.y[nearest])}${interval}`,
        ),
      );
    }
    if (shownStep === null) return;
    const x = this.toX(shownStep);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    this.cross.setAttribute("visibility", "visible");
    this.tip.replaceChildren(node("div", { class: "quiet" }, `step ${shownStep.toLocaleString("en")}`), ...lines);
    this.tip.hidden = false;
    const half = this.plot.clientWidth / 2;
    this.tip.style.left = x < half ? `${x + 26}px` : "";
    this.tip.style.right = x < half ? "" : `${this.plot.clientWidth - x + 26}px`;
  }
}

const hiddenSeries = new Set();
