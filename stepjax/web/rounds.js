// The viewer of PaCoRe's rounds: a chart with a row for each trajectory, and a card with a trajectory's details.
// It draws the trace described in stepjax/pacore/trace.py. A saved page has a whole trace (trace.js); in the chat page
// the server's events build it up (live.js). Subclasses implement `open` and `follow`.

import { facts, folded, make, pill, plural, quiet, scrolling, short, time, toolCalls, whole } from "./elements.js";

export const STATES = {
  waiting: "waiting",
  running: "writing",
  ok: "answered",
  cut: "answer cut off",
  tail: "end of its reasoning only",
  empty: "empty",
  truncated: "cut off in its reasoning",
  error: "error",
  timeout: "timed out",
  cancelled: "cancelled",
  stopped: "stopped",
};
export const ANSWERED_BY = {
  synthesis: "synthesis",
  agreement: "agreement of a round",
  vote: "vote",
  score: "score",
  fallback: "fallback, since the final call gave no answer",
};
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200]; // seconds between ticks

export const hasMessage = (each) => ["ok", "cut", "tail"].includes(each.state);
const isOver = (each) => each.seconds !== null;
const isLost = (each) => !hasMessage(each) && !["waiting", "running"].includes(each.state);
const endOf = (each, now) => each.start + (each.seconds ?? Math.max(0, now - each.start));
const speed = (each) => (each.seconds > 0 ? `${whole(Math.round(each.output_tokens / each.seconds))} tokens/s` : null);
const joined = (said) => said.filter(Boolean).join(" \u00b7 ");
// The attempts before the last one, which is listed as failed only if the call was given up.
const earlier = (each) => (["error", "timeout"].includes(each.state) ? each.attempts.slice(0, -1) : each.attempts);

export class Rounds {
  constructor(trace, prefix = "") {
    this.trace = trace;
    this.prefix = prefix; // for ids
    this.groups = []; // one for each round of the chart: {summary, rows}
    this.ticks = make("span", { class: "track" });
    this.axis = make("div", { class: "row axis", "aria-hidden": "true" }, make("span"), this.ticks);
    this.chart = make("div", { class: "chart" }, this.axis);
    this.chart.addEventListener("keydown", (event) => this.move(event));
    trace.rounds.forEach((round) => this.addGroup(round));
  }

  // Names count from 1, like the references in a prompt.

  roundName(number) {
    if (!this.trace.rounds[number].is_final) return `Round ${number + 1}`;
    return this.trace.rounds.length > 1 ? "Final synthesis" : "The only call";
  }

  nameOf({ round, index }) {
    return this.trace.rounds[round].is_final ? "final" : `${round + 1}.${index + 1}`;
  }

  idOf({ round, index }) {
    return `${this.prefix}t${round}-${index}`;
  }

  isChosen({ round, index }) {
    return this.trace.chosen?.[0] === round && this.trace.chosen[1] === index;
  }

  // A reference's source is a trajectory of the previous round, or a message given with the problem. All prompts of a
  // round number it alike, unless each has its own references.

  sourceName(number, source) {
    return number ? this.nameOf({ round: number - 1, index: source }) : `given message ${source + 1}`;
  }

  sourcesOf(each) {
    return each.references ?? this.trace.rounds[each.round].references.map(({ index }) => index);
  }

  labelOf(number, source) {
    const { has_own_references: hasOwn, references } = this.trace.rounds[number];
    if (hasOwn) return this.sourceName(number, source);
    return `Reference ${references.findIndex(({ index }) => index === source) + 1}`;
  }

  // [count, count in the reasoning]; a live trace lacks the second.
  citationsOf(each, source) {
    return each.citations[this.sourcesOf(each).indexOf(source) + 1] ?? [0, 0];
  }

  // The reference a trajectory becomes in the next round, and how often it is cited.
  become({ round, index }) {
    const next = this.trace.rounds[round + 1];
    const reference = next?.references.find((each) => each.index === index);
    if (!reference) return null;
    const times = next.trajectories.reduce((sum, each) => sum + this.citationsOf(each, index)[0], 0);
    const label = next.has_own_references ? "a reference" : this.labelOf(round + 1, index);
    return { label, isShortened: reference.state === "shortened", times };
  }

  citation(text, number, source, attributes = {}) {
    const all = { type: "button", class: "cite", text, "data-cites": `${number}-${source}`, ...attributes };
    return make("button", { ...all, click: () => this.follow(number, source) });
  }

  // Parts are strings, or [label, string] for citations.
  text(parts, each) {
    return make("div", { class: "text" }, parts.map((part) =>
      typeof part === "string" ? part : this.citation(part[1], each.round, this.sourcesOf(each)[part[0] - 1])));
  }

  // The chart: a bar spans its call's time within the problem's.

  addGroup({ number, trajectories }) {
    const name = this.roundName(number);
    const rows = trajectories.map((each) => {
      const id = `${this.prefix}bar-t${number}-${each.index}`;
      const row = make("button", { type: "button", class: "row", id, tabindex: "-1" });
      row.addEventListener("click", () => this.open(each));
      row.addEventListener("focus", () => this.stopAt(row));
      return row;
    });
    const summary = quiet("");
    this.groups.push({ summary, rows });
    const head = make("h3", {}, `${name} `, summary);
    this.axis.before(make("div", { class: "group", role: "group", "aria-label": name }, head, rows));
    if (!number) rows[0].tabIndex = 0;
  }

  refresh(now = 0) {
    const all = this.trace.rounds.flatMap(({ trajectories }) => trajectories);
    this.scale(Math.max(now, this.trace.seconds ?? 0, ...all.map((each) => endOf(each, now)), 0.001));
    this.groups.forEach(({ summary, rows }, number) => {
      const round = this.trace.rounds[number];
      summary.textContent = this.summaryOf(round, now);
      round.trajectories.forEach((each, i) => this.draw(rows[i], each));
    });
  }

  draw(row, each) {
    row.ariaLabel = this.describe(each);
    row.classList.toggle("lost", isLost(each));
    const bars = [];
    let to = each.start;
    for (const { seconds } of earlier(each).toReversed()) {
      const from = Math.max(0, to - seconds);
      bars.push(make("span", { class: "bar attempt", "--from": from, "--to": to }));
      to = from;
    }
    const kind = this.isChosen(each) ? `${each.state} chosen` : each.state;
    const end = isOver(each) ? each.start + each.seconds : "var(--end)";
    row.replaceChildren(
      make("span", { class: "name", text: this.nameOf(each) }),
      make("span", { class: "track" }, bars, make("span", { class: `bar ${kind}`, "--from": each.start, "--to": end })),
      make("span", { class: "count", text: each.output_tokens ? short(each.output_tokens) : "" }),
      make("span", { class: "note" }, this.noteOf(each)),
    );
  }

  noteOf(each) {
    if (this.isChosen(each)) return pill("chosen", "the answer");
    if (each.state !== "ok") return isOver(each) ? STATES[each.state] : null;
    const { label, times } = this.become(each) ?? {};
    return times ? pill("cited", label.replace("Reference", "Ref").replace("a reference", "cited")) : null;
  }

  describe(each) {
    const reference = this.become(each);
    const times = reference?.times === 1 ? ", cited once" : reference?.times ? `, cited ${reference.times} times` : "";
    return joined([
      `${this.nameOf(each)}: ${STATES[each.state]}`,
      plural(each.output_tokens, "token"),
      isOver(each) && time(each.seconds),
      speed(each),
      each.finish_reason && `ended by ${each.finish_reason}`,
      earlier(each).length && `${plural(earlier(each).length, "failed attempt")} before`,
      `from ${time(each.start)}`,
      reference && `${reference.label} of the next round${reference.isShortened ? ", shortened" : ""}${times}`,
    ]);
  }

  summaryOf({ is_final: isFinal, trajectories }, now) {
    const count = trajectories.length;
    const lost = trajectories.filter(isLost).length;
    const begin = Math.min(...trajectories.map((each) => each.start));
    const cited = isFinal ? Object.keys(trajectories[0].citations) : [];
    return joined([
      count > 1 && `${trajectories.filter(hasMessage).length} of ${count} answered`,
      lost && `${lost} lost`,
      `${short(trajectories.reduce((sum, each) => sum + each.output_tokens, 0))} tokens`,
      time(Math.max(...trajectories.map((each) => endOf(each, now))) - begin),
      cited.length && `cites ${cited.length > 1 ? "references" : "reference"} ${cited.join(", ")}`,
    ]);
  }

  scale(end) {
    const step = STEPS.find((each) => each >= end / 8) ?? 3600 * Math.ceil(end / 28800);
    this.chart.style.setProperty("--end", end);
    this.chart.style.setProperty("--step", step);
    const ticks = Array.from({ length: Math.floor(end / step) + 1 }, (_, i) => i * step);
    this.ticks.replaceChildren(...ticks.map((at) =>
      make("span", { class: at > 0.85 * end ? "tick last" : "tick", "--from": at, text: at ? time(at) : "0" })));
  }

  // Tab stops at one row; the arrow keys move between rows.

  stopAt(row) {
    for (const { rows } of this.groups) rows.forEach((each) => (each.tabIndex = each === row ? 0 : -1));
  }

  move(event) {
    const rows = this.groups.flatMap((group) => group.rows);
    const at = rows.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (at < 0 || !rows[to]) return;
    event.preventDefault();
    rows[to].focus();
  }

  // The card.

  card(each) {
    const kind = isLost(each) ? "lost" : each.state;
    const tokens = plural(each.output_tokens, "token");
    const attempts = () => make("ul", {}, each.attempts.map(({ status, seconds, output_tokens: tokens, error }) => {
      const lost = tokens ? `, ${plural(tokens, "token")} lost` : "";
      return make("li", { class: "text", text: `${STATES[status] ?? status} after ${time(seconds)}${lost}: ${error}` });
    }));
    const details = () => facts([
      ["in the records", `round ${each.round}, index ${each.index}`],
      ["seed", each.seed === null ? null : String(each.seed)],
      ["start", time(each.start)],
      ["prompt tokens", whole(each.prompt_tokens)],
      ["shared", whole(each.cached_tokens)],
      ["mean log-probability", each.mean_logprob?.toFixed(3)],
    ]);
    const label = `Trajectory ${this.nameOf(each)}`;
    return make("article", { id: this.idOf(each), class: `card ${kind}`, tabindex: "-1", "aria-label": label },
      make("header", {},
        make("h4", { text: this.nameOf(each) }),
        this.isChosen(each) && pill("chosen", "the answer"),
        each.state !== "ok" && pill(kind === "lost" ? "lost" : isOver(each) ? "cut" : "", STATES[each.state]),
        rightOrWrong(each.correct),
        each.answer && make("span", { class: "short", text: each.answer, title: "the answer found in the message" }),
      ),
      quiet(joined([tokens, isOver(each) && time(each.seconds), speed(each), each.finish_reason]), "p"),
      this.written(each),
      this.links(each),
      each.attempts.length > 0 && folded(plural(each.attempts.length, "failed attempt"), attempts, { class: "more" }),
      folded("Details", details, { class: "more" }),
    );
  }

  // The trajectory's output.
  written(each) {
    const length = each.reasoning.reduce((sum, part) => sum + (typeof part === "string" ? part : part[1]).length, 0);
    const reasoning = () => scrolling(this.text(each.reasoning, each));
    return [
      each.error && make("p", { class: "error text", text: each.error }),
      each.message.length > 0 && scrolling(this.text(each.message, each)),
      toolCalls(each.tool_calls),
      each.passed_on && make("div", { class: "passed" }, quiet("Passed on, the end of its reasoning:", "p"),
        scrolling(make("div", { class: "text", text: each.passed_on }))),
      length > 0 && folded(`Reasoning, ${plural(length, "character")}`, reasoning, { class: "reasoning" }),
    ];
  }

  // The references it sees and cites, and the one it becomes.
  links(each) {
    const line = (said, ...children) => make("p", { class: "cites" }, quiet(said), children);
    const [number, sources, cited] = [each.round, this.sourcesOf(each), Object.entries(each.citations)];
    const reference = this.become(each);
    const isLeftOut = this.trace.rounds[number + 1]?.left_out.includes(each.index);
    return [
      each.references && line("sees", sources.map((source, i) =>
        this.citation(`${i + 1} \u2190 ${this.sourceName(number, source)}`, number, source))),
      cited.length > 0 && line("cites", cited.map(([label, counts]) => {
        const text = counts[0] > 1 ? `${label} \u00d7${counts[0]}` : label;
        const said = { "aria-label": `Reference ${label}, ${timesOf(counts)}` };
        return this.citation(text, number, sources[label - 1], said);
      })),
      reference && line("is", this.citation(reference.label, number + 1, each.index), quiet("in the next round")),
      isLeftOut && line("left out of the next round: did not fit the prompt"),
    ];
  }
}

export const rightOrWrong = (correct) =>
  correct === true ? pill("right", "right") : correct === false ? pill("wrong", "wrong") : null;

export const timesOf = ([times, inReasoning]) =>
  `${plural(times, "time")}${inReasoning === undefined ? "" : `, ${whole(inReasoning)} of them in the reasoning`}`;
