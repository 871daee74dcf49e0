// Charts of the runs' metrics: curves, accuracy, and the time of each phase of a step.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const runColor = (i) => `var(--run-${i % 8})`;

// band: the metric with the standard error; limited: the constraint's limit and the steps in which it acted are shown.
const CURVES = [
  { key: "reward/mean", title: "Reward", help: "mean over the step's responses" },
  { key: "policy/kl_after", title: "KL after the step", help: "after its last update", limited: true },
  {
    key: "constraint/kl_after_over_delta",
    title: "KL after the step / δ",
    help: "the run warns if it stays above 2",
    fromZero: true,
    rules: [{ y: 1, label: "δ" }],
  },
  {
    key: "policy/kl",
    title: "KL to the old policy",
    band: "policy/kl_stderr",
    help: "k1 of the last mini-batch",
    limited: true,
  },
  {
    key: "policy/kl_k3",
    title: "KL to the old policy, k3",
    band: "policy/kl_k3_stderr",
    help: "k3 of the last mini-batch",
    limited: true,
  },
  { key: "policy/entropy", title: "Entropy", help: "nats a token" },
  { key: "response/length_mean", title: "Response length", help: "mean, tokens", fromZero: true },
  { key: "groups/mixed", title: "Mixed groups", help: "share with right and wrong responses", range: [0, 1] },
  { key: "groups/all_wrong", title: "Questions all wrong", help: "share of the step's questions", range: [0, 1] },
  { key: "groups/all_right", title: "Questions all right", help: "share of the step's questions", range: [0, 1] },
  { key: "groups/never_solved", title: "Never solved", help: "share of the questions asked so far", range: [0, 1] },
  {
    key: "dro/effective_sample",
    title: "Effective sample size",
    help: "of the DRO weights, over the number of wrong responses; near 1 tau has no effect",
    range: [0, 1],
  },
  { key: "grad_norm", title: "Gradient norm", help: "", fromZero: true },
  { key: "objective/value", title: "Objective", help: "J, maximised" },
];
const isShownElsewhere = (key) =>
  key.startsWith("time/") ||
  (key.startsWith("eval/") && key.endsWith("/pass@1")) ||
  ["constraint/active", "constraint/delta"].includes(key) ||
  CURVES.some((c) => c.key === key || c.band === key);

// A series for each run that has the metric; band: the metric with its standard error.
function seriesOf(key, band) {
  return data.runs.flatMap((run, i) => {
    const y = run.series[key],
      error = band && run.series[band];
    if (!y) return [];
    const edge = (sign) => y.map((v, j) => (v === null || error[j] === null ? null : v + sign * error[j]));
    return [
      { label: run.label, color: runColor(i), x: run.steps, y, ...(error ? { low: edge(-1), high: edge(1) } : {}) },
    ];
  });
}

// A horizontal line for each KL limit, in its run's colour if the limits differ.
function constraintRules() {
  const limits = [...new Set(data.runs.map((run) => run.delta).filter((d) => d !== null))];
  return limits.map((y) => {
    const only = limits.length > 1 ? data.runs.findIndex((run) => run.delta === y) : -1;
    return { y, label: `δ = ${formatNumber(y)}`, ...(only < 0 ? {} : { color: runColor(only) }) };
  });
}

// The series with ticks at the steps in which the constraint was active.
function markConstraintSteps(series) {
  return series.map((s) => {
    const run = data.runs.find((r) => r.label === s.label),
      active = run.series["constraint/active"];
    return active ? { ...s, ticks: run.steps.filter((_, i) => active[i] > 0) } : s;
  });
}

function drawCurve(host, curve) {
  let series = seriesOf(curve.key, curve.band);
  let help = curve.help;
  if (series.some((s) => s.low)) help += " ± one standard error";
  const spec = { ...curve };
  if (curve.limited) {
    series = markConstraintSteps(series);
    spec.rules = constraintRules();
    if (series.some((s) => s.ticks)) help += "; marks: constraint active";
    if (!spec.rules.length) help += "; δ unknown";
  }
  new LineChart(host, { ...spec, help, series });
}

function drawAccuracy(host) {
  for (const set of new Set(data.runs.flatMap((run) => Object.keys(run.accuracy)))) {
    const series = data.runs.flatMap((run, i) => {
      const points = run.accuracy[set];
      return points
        ? [
            {
              label: run.label,
              color: runColor(i),
              x: points.map((p) => p.step),
              y: points.map((p) => p.value),
              low: points.map((p) => p.low),
              high: points.map((p) => p.high),
              points: true,
            },
          ]
        : [];
    });
    new LineChart(host, { title: `Pass@1, ${set}`, help: "band: 95% interval", series });
  }
}

function drawLegend() {
  if (data.runs.length < 2) return;
  document.getElementById("legend").append(
    ...data.runs.map((run, i) =>
      node(
        "button",
        {
          "aria-pressed": "true",
          onclick: (event) => {
            const hide = !hiddenSeries.has(run.label);
            if (hide) hiddenSeries.add(run.label);
            else hiddenSeries.delete(run.label);
            event.currentTarget.setAttribute("aria-pressed", String(!hide));
            LineChart.all.forEach((chart) => chart.draw());
          },
        },
        node("i", { class: `chip run-${i % 8}` }),
        run.label,
      ),
    ),
  );
}

function drawCurves() {
  const host = document.getElementById("charts"),
    more = document.getElementById("more");
  const present = new Set(data.runs.flatMap((run) => Object.keys(run.series)));
  drawLegend();
  document.getElementById("smoothing").hidden = !data.runs.some((run) => run.steps.length >= 2 * SMOOTH_OVER);
  const [reward, ...others] = CURVES.filter((curve) => present.has(curve.key));
  if (reward) drawCurve(host, reward);
  drawAccuracy(host);
  others.forEach((curve) => drawCurve(host, curve));
  if (!host.children.length) host.append(node("p", { class: "quiet" }, "No metrics were found."));
  const rest = [...present].filter((key) => !isShownElsewhere(key)).sort();
  if (!rest.length) {
    more.remove();
    return;
  }
  more.addEventListener(
    "toggle",
    () => rest.forEach((key) => drawCurve(more.querySelector(".charts"), { key, title: key, help: "" })),
    { once: true },
  );
}

// Seconds of each phase in each step that has a time; "other" is the rest of the step.
function phasesOf(run) {
  const steps = run.steps.map((_, i) => i).filter((i) => run.series["time/step"]?.[i] != null);
  const columns = data.phases.map((phase) => steps.map((i) => run.series[`time/${phase}`]?.[i] ?? 0));
  const other = steps.map((i, j) =>
    Math.max(0, run.series["time/step"][i] - columns.reduce((sum, column) => sum + column[j], 0)),
  );
  return { steps: steps.map((i) => run.steps[i]), names: [...data.phases, "other"], columns: [...columns, other] };
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function drawPhases(host, run, index) {
  const { steps, names, columns } = phasesOf(run);
  if (!steps.length) return;
  const means = columns.map(mean),
    total = means.reduce((a, b) => a + b, 0) || 1;
  const title = node(
    "h3",
    {},
    ...(data.runs.length > 1 ? [node("i", { class: `chip run-${index % 8}` }), run.label] : ["Seconds a step"]),
  );
  const share = node(
    "div",
    { class: "share" },
    ...means.map((m, i) =>
      node("div", { style: `background: var(--phase-${i}); flex: ${m / total}`, title: names[i] }),
    ),
  );
  const keys = node(
    "div",
    { class: "keys" },
    ...means.map((m, i) =>
      node(
        "span",
        {},
        node("i", { class: "chip", style: `background: var(--phase-${i})` }),
        `${names[i].replace("_", "-")} `,
        node("b", {}, `${formatNumber(m)} s, ${Math.round((100 * m) / total)}%`),
      ),
    ),
  );
  const plot = node("div");
  host.append(node("div", { class: "chart" }, title, share, keys, plot));
  new ResizeObserver(() => plot.replaceChildren(stackedColumns(steps, columns, plot.clientWidth))).observe(plot);
}

// Means over `bins` ranges of neighbouring steps, since a chart has fewer columns than a long run has steps.
function binMeans(values, bins) {
  const size = values.length / bins;
  return Array.from({ length: bins }, (_, b) => mean(values.slice(Math.floor(b * size), Math.floor((b + 1) * size))));
}

function stackedColumns(steps, columns, width) {
  const [left, right, top, bottom] = [52, width - 6, 6, 150];
  const bins = Math.min(steps.length, 120);
  const binned = columns.map((column) => binMeans(column, bins));
  const highest = Math.max(...binned[0].map((_, b) => binned.reduce((sum, column) => sum + column[b], 0))) * 1.05 || 1;
  const toY = (y) => bottom - (y / highest) * (bottom - top);
  const picture = canvas(width, bottom + 20, "seconds of each phase by step");
  picture.append(...gridLines(niceTicks(0, highest, 3), toY, left, right));
  const each = (right - left) / bins;
  const gap = each > 4 ? 1 : 0;
  for (let b = 0; b < bins; b++) {
    let below = 0;
    binned.forEach((column, i) => {
      const y = toY(below + column[b]);
      const size = { width: each - gap, height: toY(below) - y };
      picture.append(shape("rect", { x: left + b * each, y, ...size, fill: `var(--phase-${i})` }));
      below += column[b];
    });
  }
  const labelled = new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * (steps.length - 1))));
  for (const i of labelled) {
    const x = left + ((i + 0.5) / steps.length) * (right - left);
    picture.append(shape("text", { x, y: bottom + 15, "text-anchor": "middle" }, steps[i].toLocaleString("en")));
  }
  return picture;
}

drawCurves();
const phaseHost = document.getElementById("phases");
data.runs.forEach((run, i) => drawPhases(phaseHost, run, i));
if (!phaseHost.children.length) phaseHost.append(node("p", { class: "quiet" }, "No step times were found."));
