// The rollout browser: filters over the index. Texts are unpacked when shown, rows drawn when visible.
"use strict";

const ROW_HEIGHT = 64;
const OUTCOMES = {
  all: () => true,
  mixed: (g) => g.right > 0 && g.right < g.size,
  "all correct": (g) => g.right === g.size,
  "all wrong": (g) => g.right === 0,
  "some truncated": (g) => g.truncated > 0,
};
const ORDERS = {
  "step, first to last": (a, b) => a.step - b.step || a.run - b.run || a.id - b.id,
  "step, last to first": (a, b) => b.step - a.step || a.run - b.run || a.id - b.id,
  "reward, low to high": (a, b) => a.reward - b.reward || a.id - b.id,
  "reward, high to low": (a, b) => b.reward - a.reward || a.id - b.id,
  "length, long to short": (a, b) => b.length - a.length || a.id - b.id,
};

// The groups with their statistics. start: the group's first response in the index's columns of responses.
function readGroups(index) {
  let next = 0;
  return index.size.map((size, id) => {
    const start = next;
    next += size;
    const values = (column) => index[column].slice(start, start + size);
    const sum = (column) => values(column).reduce((a, b) => a + (b ?? 0), 0);
    return {
      id,
      size,
      start,
      run: index.run[id],
      step: index.step[id],
      questionId: index.question_id[id],
      snippet: index.snippet[id],
      chunk: index.chunk[id],
      slot: index.slot[id],
      right: sum("correct"),
      truncated: sum("truncated"),
      reward: sum("reward") / size,
      length: sum("length") / size,
    };
  });
}

const unpackedChunks = new Map();

// Promise of the JSON value in the script element `id`; null if the page has no such element.
function unpack(id) {
  if (!unpackedChunks.has(id)) {
    const element = document.getElementById(id);
    if (!element) return null;
    const packed = atob(element.textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpackedChunks.set(id, new Response(stream).json());
  }
  return unpackedChunks.get(id);
}

const span = (text) => node("span", {}, text);
const unpackTexts = async (group) => (await unpack(`chunk-${group.chunk}`))[group.slot];
const unpackTokens = async (group) => (await unpack(`tokens-${group.chunk}`))?.[group.slot] ?? [];
const literalPattern = (words) => (words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu") : null);

// A function (from, to) that returns the nodes of text[from, to) with the pattern's matches marked; to be called with
// consecutive ranges, from the beginning of the text to its end.
function marker(text, pattern) {
  const matches = pattern ? [...text.matchAll(pattern)].map((m) => [m.index, m.index + m[0].length]) : [];
  let next = 0;
  return (from, to) => {
    const nodes = [];
    while (from < to) {
      while (next < matches.length && matches[next][1] <= from) next++;
      const [start, end] = matches[next] ?? [to, to];
      const inside = start <= from;
      const until = Math.min(to, inside ? end : start);
      nodes.push(inside ? node("mark", {}, text.slice(from, until)) : text.slice(from, until));
      from = until;
    }
    return nodes;
  };
}

function markedText(text, pattern) {
  const box = node("div", { class: "text" });
  for (const part of marker(text, pattern)(0, text.length)) box.append(part);
  return box;
}

class RolloutBrowser {
  constructor(host, index) {
    this.index = index;
    this.groups = readGroups(index);
    this.search = 0; // number of the latest search; an older one that is still running stops
    this.buildFilters();
    this.canvas = node("div", { role: "listbox", "aria-label": "groups" });
    this.list = node("div", { class: "list", tabindex: "0" }, this.canvas);
    this.pane = node("div", { class: "group" });
    host.append(this.filters, node("div", { class: "panes" }, this.list, this.pane));
    this.list.addEventListener("scroll", () => this.drawRows());
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.drawRows()).observe(this.list);
    this.apply();
  }

  buildFilters() {
    const apply = () => this.apply();
    let timer;
    const applySoon = () => {
      clearTimeout(timer);
      timer = setTimeout(apply, 200);
    };
    const dropDown = (label, names) =>
      node("select", { "aria-label": label, onchange: apply }, ...names.map((n, i) => node("option", { value: i }, n)));
    this.words = node("input", {
      type: "search",
      placeholder: "Search questions, responses and answers",
      oninput: applySoon,
    });
    this.step = node("input", {
      type: "number",
      placeholder: "any step",
      "aria-label": "step",
      min: 0,
      oninput: applySoon,
    });
    this.outcome = dropDown(
      "outcome",
      Object.keys(OUTCOMES).map((name) => (name === "all" ? "all groups" : name)),
    );
    this.order = dropDown("order", Object.keys(ORDERS));
    this.run = dropDown("run", ["all runs", ...data.runs.map((run) => run.label)]);
    this.run.hidden = data.runs.length < 2;
    this.colour = node(
      "select",
      { "aria-label": "colour of tokens", onchange: () => this.select(this.selected) },
      ...COLOURINGS.map((colouring, i) => node("option", { value: i }, colouring.name)),
    );
    this.colour.hidden = !document.querySelector("script[id^=tokens-]");
    this.count = node("span", { class: "quiet", role: "status" });
    this.filters = node(
      "div",
      { class: "filters" },
      this.words,
      this.run,
      this.step,
      this.outcome,
      this.order,
      this.colour,
      this.count,
    );
  }

  async apply() {
    const search = ++this.search;
    const outcome = Object.values(OUTCOMES)[this.outcome.value],
      run = Number(this.run.value) - 1;
    let matches = this.groups.filter(
      (g) => outcome(g) && (run < 0 || g.run === run) && (this.step.value === "" || g.step === Number(this.step.value)),
    );
    const pattern = literalPattern(this.words.value.trim());
    if (pattern) matches = await this.searchTexts(matches, pattern, search);
    if (search !== this.search) return;
    this.pattern = pattern;
    this.matches = matches.sort(Object.values(ORDERS)[this.order.value]);
    const responses = matches.reduce((sum, g) => sum + g.size, 0);
    const [shown, all, total] = [matches.length, this.groups.length, responses].map((n) => n.toLocaleString("en"));
    this.count.textContent = `${shown} of ${all} groups, ${total} responses`;
    this.canvas.style.height = `${matches.length * ROW_HEIGHT}px`;
    this.list.scrollTop = 0;
    this.select(0);
  }

  // The groups whose texts match the pattern; lets the page respond every 40 ms.
  async searchTexts(groups, pattern, search) {
    const matches = [];
    let lastPause = performance.now();
    for (const [i, group] of groups.entries()) {
      const texts = await unpackTexts(group);
      if (search !== this.search) return [];
      if ([texts.question, texts.answer, ...texts.responses].some((text) => text.search(pattern) >= 0))
        matches.push(group);
      if (performance.now() - lastPause > 40) {
        this.count.textContent = `searching: ${Math.round((100 * i) / groups.length)}%`;
        await new Promise((resolve) => setTimeout(resolve));
        lastPause = performance.now();
      }
    }
    return matches;
  }

  // Rows of the groups on screen, and of four more on either side.
  drawRows() {
    if (!this.matches) return;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW_HEIGHT) - 4);
    const bottom = this.list.scrollTop + this.list.clientHeight;
    const last = Math.min(this.matches.length, Math.ceil(bottom / ROW_HEIGHT) + 4);
    this.canvas.replaceChildren(...this.matches.slice(first, last).map((group, i) => this.row(group, first + i)));
  }

  row(group, position) {
    const dots = node("span", { class: "dots" });
    for (let r = group.start; r < group.start + group.size; r++) {
      const right = this.index.correct[r];
      dots.append(node("span", { class: right ? "right" : "wrong" }, right ? "●" : "○"));
    }
    const chip = data.runs.length > 1 ? [node("i", { class: `chip run-${group.run % 8}`, style: "margin: 0" })] : [];
    return node(
      "div",
      {
        class: "row",
        role: "option",
        "aria-selected": String(position === this.selected),
        style: `top: ${position * ROW_HEIGHT}px`,
        onclick: () => this.select(position),
      },
      node(
        "div",
        { class: "top" },
        ...chip,
        span(`step ${group.step}`),
        span(`reward ${formatNumber(group.reward)}`),
        dots,
      ),
      node("div", { class: "snippet" }, group.snippet || "(no question text)"),
    );
  }

  onKey(event) {
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!move || !this.matches.length) return;
    event.preventDefault();
    this.select(Math.min(this.matches.length - 1, Math.max(0, this.selected + move)));
    const top = this.selected * ROW_HEIGHT,
      bottom = top + ROW_HEIGHT;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    if (bottom > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = bottom - this.list.clientHeight;
  }

  // Show the group at a position of the list: its question, and its responses side by side.
  async select(position) {
    this.selected = position;
    this.drawRows();
    const group = this.matches[position];
    if (!group) {
      this.pane.replaceChildren(node("p", { class: "empty" }, "No group matches."));
      return;
    }
    const colouring = COLOURINGS[this.colour.value];
    const texts = await unpackTexts(group);
    const tokens = colouring.value ? await unpackTokens(group) : [];
    if (this.matches[this.selected] !== group || colouring !== COLOURINGS[this.colour.value]) return;
    const run = data.runs.length > 1 ? `${data.runs[group.run].label}, ` : "";
    const verdict = `${group.right} of ${group.size} correct`;
    const title = `${run}step ${group.step}, question ${group.questionId ?? "?"}: ${verdict}`;
    const question = node(
      "div",
      { class: "question" },
      node("div", { class: "quiet" }, title),
      markedText(texts.question || texts.prompt, this.pattern),
    );
    if (texts.answer) question.append(node("div", { class: "quiet" }, "answer ", node("b", {}, texts.answer)));
    if (texts.prompt && texts.question)
      question.append(
        node("details", {}, node("summary", {}, "the model's prompt"), markedText(texts.prompt, null)),
      );
    const top = fullColourValue(tokens, colouring.value);
    const response = (text, i) => {
      const values = tokens[i]?.[colouring.value];
      const body =
        values && top > 0
          ? colouredText(text, this.pattern, tokens[i].widths, values, colouring, top)
          : markedText(text, this.pattern);
      return this.response(text, body, group.start + i);
    };
    const responses = node("div", { class: "responses" }, ...texts.responses.map(response));
    this.pane.replaceChildren(question, ...colourKey(colouring, tokens, top), responses);
    for (const box of responses.querySelectorAll(".text")) {
      const mark = box.querySelector("mark");
      if (mark) box.scrollTop = mark.offsetTop - box.offsetTop - box.clientHeight / 3;
    }
  }

  response(text, body, r) {
    const { correct, reward, length, truncated } = this.index;
    const head = node(
      "div",
      { class: "head" },
      node("b", { class: correct[r] ? "right" : "wrong" }, correct[r] ? "✓ correct" : "✗ wrong"),
      span(`reward ${reward[r] === null ? "?" : formatNumber(reward[r])}`),
    );
    if (length[r] !== null) head.append(span(`${length[r].toLocaleString("en")} tokens`));
    if (truncated[r]) head.append(node("span", { class: "limit" }, "✂ truncated"));
    return node(
      "div",
      { class: "response" },
      head,
      text ? body : node("p", { class: "empty" }, "(empty response)"),
    );
  }
}

const browserHost = document.getElementById("browser");
if (!data.index.size.length) browserHost.append(node("p", { class: "quiet" }, "No rollouts were saved."));
else if (typeof DecompressionStream === "undefined")
  browserHost.append(
    node(
      "p",
      { class: "notes" },
      "This browser cannot unpack the rollouts: it needs Chrome 80, Firefox 113, Safari 16.4 or later.",
    ),
  );
else new RolloutBrowser(browserHost, data.index);
