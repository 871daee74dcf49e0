// Responses with tokens coloured by a value of training. Tokens of a response: { widths, weight, log_ratio }, or null.
"use strict";

const SHADES = 4; // on either side of 0
const COLOURINGS = [
  { name: "tokens not coloured", value: null },
  {
    name: "tokens by weight",
    value: "weight",
    unit: "weight",
    meaning: "weight in the objective, −d loss / d log-prob times the mini-batch's number of tokens",
    low: "made less likely",
    high: "made more likely",
    none: "All weights are 0: these responses have no gradient.",
  },
  {
    name: "tokens by log-ratio",
    value: "log_ratio",
    unit: "log-ratio",
    meaning: "log-ratio of the policy in training to the one that sampled",
    low: "less likely than when sampled",
    high: "more likely",
    none: "All log-ratios are 0: in a step's first mini-batch the policy is still the one that sampled.",
  },
];

const signed = (value) => (value < 0 ? "−" : "+") + formatNumber(Math.abs(value));
const valueAt = (values, i) => values.all ?? values.levels[i] * values.unit;

// The size of value that gets the full colour: the 98th percentile over the group's tokens.
function fullColourValue(tokens, name) {
  const sizes = [];
  for (const response of tokens) {
    const values = response?.[name];
    if (values) response.widths.forEach((_, i) => sizes.push(Math.abs(valueAt(values, i))));
  }
  sizes.sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor((sizes.length - 1) * 0.98)] || sizes[sizes.length - 1] : 0;
}

// CSS class of a value's colour; "" for one near 0.
function shadeOf(value, top) {
  const shade = Math.max(-SHADES, Math.min(SHADES, Math.round((SHADES * value) / top)));
  return shade === 0 ? "" : `${shade > 0 ? "up" : "down"}-${Math.abs(shade)}`;
}

function colouredText(text, pattern, widths, values, colouring, top) {
  const box = node("div", { class: "text" });
  const nextNodes = marker(text, pattern);
  const paint = (shade, value, parts) => {
    const title = `${colouring.unit} ${signed(value)}`;
    if (shade) box.append(node("span", { class: shade, title }, ...parts));
    else for (const part of parts) box.append(part);
  };
  // One element for the whole text if all tokens have the same value; tokens without colour become plain text.
  let start = 0;
  if (values.all !== undefined) paint(shadeOf(values.all, top), values.all, nextNodes(0, text.length));
  else
    widths.forEach((width, i) => {
      const value = valueAt(values, i);
      paint(shadeOf(value, top), value, nextNodes(start, start + width));
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

// The legend of the colours, above the responses; empty without colours.
function colourKey(colouring, tokens, top) {
  if (!colouring.value) return [];
  const line = (...children) => [node("div", { class: "key quiet", role: "note" }, ...children)];
  if (!tokens.some((response) => response?.[colouring.value]))
    return line("No token values were saved for these responses.");
  if (!top) return line(colouring.none);
  const shades = [];
  for (let shade = -SHADES; shade <= SHADES; shade++)
    shades.push(node("span", { class: `swatch ${shadeOf(shade, SHADES)}` }));
  return line(
    span(`${colouring.meaning}:`),
    span(`${signed(-top)}, ${colouring.low}`),
    node("span", {}, ...shades),
    span(`${signed(top)}, ${colouring.high}`),
  );
}
