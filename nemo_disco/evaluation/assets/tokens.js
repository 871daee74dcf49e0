// Responses with their tokens coloured by what training said of them; tokens are { widths, weight, log_ratio } or null.
"use strict";

const SHADES = 4; // on either side of 0
const COLOURINGS = [
  { name: "tokens not coloured", value: null },
  {
    name: "tokens by weight",
    value: "weight",
    unit: "weight",
    said: "weight in the objective, −d loss / d log-prob times the mini-batch's tokens",
    low: "made less likely",
    high: "made likelier",
    none: "Every weight is 0: the objective asks nothing of these responses.",
  },
  {
    name: "tokens by log-ratio",
    value: "log_ratio",
    unit: "log-ratio",
    said: "log-ratio, the policy that was trained to the one that sampled",
    low: "less likely than when sampled",
    high: "likelier",
    none: "Every log-ratio is 0: these responses were in the step's first mini-batch, where the policy is still the one that sampled.",
  },
];

const signed = (value) => (value < 0 ? "−" : "+") + formatNumber(Math.abs(value));
const valueAt = (values, i) => values.all ?? values.levels[i] * values.unit;

// The value that gets the full colour: the group's largest but for one token in fifty.
function topOf(tokens, name) {
  const sizes = [];
  for (const of of tokens) {
    const values = of?.[name];
    if (values) of.widths.forEach((_, i) => sizes.push(Math.abs(valueAt(values, i))));
  }
  sizes.sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor((sizes.length - 1) * 0.98)] || sizes[sizes.length - 1] : 0;
}

function shadeOf(value, top) {
  const shade = Math.max(-SHADES, Math.min(SHADES, Math.round((SHADES * value) / top)));
  return shade === 0 ? "" : `${shade > 0 ? "up" : "down"}-${Math.abs(shade)}`;
}

function painted(text, pattern, widths, values, colouring, top) {
  const box = node("div", { class: "text" });
  const cut = marker(text, pattern);
  const paint = (shade, value, parts) => {
    const title = `${colouring.unit} ${signed(value)}`;
    if (shade) box.append(node("span", { class: shade, title }, ...parts));
    else for (const part of parts) box.append(part);
  };
  // Where every token has the same value one element does; tokens without colour become plain text.
  let start = 0;
  if (values.all !== undefined) paint(shadeOf(values.all, top), values.all, cut(0, text.length));
  else
    widths.forEach((width, i) => {
      const value = valueAt(values, i);
      paint(shadeOf(value, top), value, cut(start, start + width));
      start += width;
    });
  const last = widths.length - 1;
  if (widths[last] === 0) {
    const value = valueAt(values, last);
    const title = `${colouring.unit} ${signed(value)}`;
    box.append(node("span", { class: `end ${shadeOf(value, top)}`, title }, "end"));
  }
  return box;
}

// What the colours mean, above the responses; nothing where there are none.
function colourKey(colouring, tokens, top) {
  if (!colouring.value) return [];
  const line = (...children) => [node("div", { class: "key quiet", role: "note" }, ...children)];
  if (!tokens.some((of) => of?.[colouring.value])) return line("No values of these responses' tokens were saved.");
  if (!top) return line(colouring.none);
  const shades = [];
  for (let shade = -SHADES; shade <= SHADES; shade++)
    shades.push(node("span", { class: `swatch ${shadeOf(shade, SHADES)}` }));
  return line(
    span(`${colouring.said}:`),
    span(`${signed(-top)}, ${colouring.low}`),
    node("span", {}, ...shades),
    span(`${signed(top)}, ${colouring.high}`),
  );
}
