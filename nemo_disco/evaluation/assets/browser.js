// The rollout browser: filters over the index; texts are unpacked when looked at, rows made when on screen.
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

function readGroups(index) {
  let start = 0;
  return index.size.map((size, id) => {
    const at = start;
    start += size;
    const over = (column) => index[column].slice(at, at + size);
    const sum = (column) => over(column).reduce((a, b) => a + (b ?? 0), 0);
    return {
      id,
      size,
      at,
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

const unpacked = new Map();

// id: of the script element that holds it; null where the page has none.
function unpack(id) {
  if (!unpacked.has(id)) {
    const element = document.getElementById(id);
    if (!element) return null;
    const packed = atob(element.textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, new Response(stream).json());
  }
  return unpacked.get(id);
}

const span = (text) => node("span", {}, text);
const textsOf = async (group) => (await unpack(`chunk-${group.chunk}`))[group.slot];
const tokensOf = async (group) => (await unpack(`tokens-${group.chunk}`))?.[group.slot] ?? [];
const patternOf = (words) => (words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu") : null);

// A maker of the nodes of text[from, to) with what the pattern matches marked; to be asked from the beginning to the end.
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

function marked(text, pattern) {
  const box = node("div", { class: "text" });
  for (const part of marker(text, pattern)(0, text.length)) box.append(part);
  return box;
}

class RolloutBrowser {
  constructor(host, index) {
    this.index = index;
    this.groups = readGroups(index);
    this.search = 0; // the number of the latest search: an older one that is still running gives up
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
    const later = () => {
      clearTimeout(timer);
      timer = setTimeout(apply, 200);
    };
    const choice = (label, names) =>
      node("select", { "aria-label": label, onchange: apply }, ...names.map((n, i) => node("option", { value: i }, n)));
    this.words = node("input", {
      type: "search",
      placeholder: "Search questions, responses and answers",
      oninput: later,
    });
    this.step = node("input", {
      type: "number",
      placeholder: "any step",
      "aria-label": "step",
      min: 0,
      oninput: later,
    });
    this.outcome = choice(
      "outcome",
      Object.keys(OUTCOMES).map((name) => (name === "all" ? "all groups" : name)),
    );
    this.order = choice("order", Object.keys(ORDERS));
    this.run = choice("run", ["all runs", ...data.runs.map((run) => run.label)]);
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
    let kept = this.groups.filter(
      (g) => outcome(g) && (run < 0 || g.run === run) && (this.step.value === "" || g.step === Number(this.step.value)),
    );
    const pattern = patternOf(this.words.value.trim());
    if (pattern) kept = await this.matching(kept, pattern, search);
    if (search !== this.search) return;
    this.pattern = pattern;
    this.kept = kept.sort(Object.values(ORDERS)[this.order.value]);
    const responses = kept.reduce((sum, g) => sum + g.size, 0);
    const [shown, all, of] = [kept.length, this.groups.length, responses].map((n) => n.toLocaleString("en"));
    this.count.textContent = `${shown} of ${all} groups, ${of} responses`;
    this.canvas.style.height = `${kept.length * ROW_HEIGHT}px`;
    this.list.scrollTop = 0;
    this.select(0);
  }

  async matching(groups, pattern, search) {
    const found = [];
    let breath = performance.now();
    for (const [i, group] of groups.entries()) {
      const texts = await textsOf(group);
      if (search !== this.search) return [];
      if ([texts.question, texts.answer, ...texts.responses].some((text) => text.search(pattern) >= 0))
        found.push(group);
      if (performance.now() - breath > 40) {
        this.count.textContent = `searching: ${Math.round((100 * i) / groups.length)}%`;
        await new Promise((resolve) => setTimeout(resolve));
        breath = performance.now();
      }
    }
    return found;
  }

  drawRows() {
    if (!this.kept) return;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(this.kept.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW_HEIGHT) + 4);
    this.canvas.replaceChildren(...this.kept.slice(first, last).map((group, i) => this.row(group, first + i)));
  }

  row(group, position) {
    const dots = node("span", { class: "dots" });
    for (let r = group.at; r < group.at + group.size; r++) {
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
    if (!move || !this.kept.length) return;
    event.preventDefault();
    this.select(Math.min(this.kept.length - 1, Math.max(0, this.selected + move)));
    const top = this.selected * ROW_HEIGHT,
      bottom = top + ROW_HEIGHT;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    if (bottom > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = bottom - this.list.clientHeight;
  }

  async select(position) {
    this.selected = position;
    this.drawRows();
    const group = this.kept[position];
    if (!group) {
      this.pane.replaceChildren(node("p", { class: "empty" }, "No group matches."));
      return;
    }
    const colouring = COLOURINGS[this.colour.value];
    const texts = await textsOf(group);
    const tokens = colouring.value ? await tokensOf(group) : [];
    if (this.kept[this.selected] !== group || colouring !== COLOURINGS[this.colour.value]) return;
    const run = data.runs.length > 1 ? `${data.runs[group.run].label}, ` : "";
    const verdict = `${group.right} of ${group.size} correct`;
    const title = `${run}step ${group.step}, question ${group.questionId ?? "?"}: ${verdict}`;
    const question = node(
      "div",
      { class: "question" },
      node("div", { class: "quiet" }, title),
      marked(texts.question || texts.prompt, this.pattern),
    );
    if (texts.answer) question.append(node("div", { class: "quiet" }, "answer ", node("b", {}, texts.answer)));
    if (texts.prompt && texts.question)
      question.append(
        node("details", {}, node("summary", {}, "the prompt, as the model got it"), marked(texts.prompt, null)),
      );
    const top = topOf(tokens, colouring.value);
    const response = (text, i) => {
      const values = tokens[i]?.[colouring.value];
      const body =
        values && top > 0
          ? painted(text, this.pattern, tokens[i].widths, values, colouring, top)
          : marked(text, this.pattern);
      return this.response(text, body, group.at + i);
    };
    const responses = node("div", { class: "responses" }, ...texts.responses.map(response));
    this.pane.replaceChildren(question, ...colourKey(colouring, tokens, top), responses);
    for (const box of responses.querySelectorAll(".text")) {
      const hit = box.querySelector("mark");
      if (hit) box.scrollTop = hit.offsetTop - box.offsetTop - box.clientHeight / 3;
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
