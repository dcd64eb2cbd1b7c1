// Live rounds: the server's events build up the trace, and a row unfolds into the trajectory's card.

import { make } from "./elements.js";
import { ANSWERED_BY, Rounds, hasMessage } from "./rounds.js";

const BLANK = {
  state: "waiting", message: [], passed_on: null, reasoning: [], tool_calls: [], citations: {}, references: null,
  answer: null, correct: null, finish_reason: null, error: null, seed: null, mean_logprob: null,
  prompt_tokens: 0, cached_tokens: 0, output_tokens: 0, seconds: null,
};

let numTraces = 0; // makes ids unique on the page

export class LiveRounds extends Rounds {
  constructor() {
    super({ rounds: [], chosen: null, seconds: null }, `live${++numTraces}-`);
    this.begun = performance.now();
    this.note = make("p", { class: "quiet", hidden: true });
    this.reading = make("div", { class: "reading", id: `${this.prefix}reading` });
    this.element = make("section", { class: "rounds", "aria-label": "Rounds of PaCoRe" }, this.chart, this.note);
  }

  get now() {
    return (performance.now() - this.begun) / 1000;
  }

  take(event) {
    const trajectories = this.trace.rounds[event.round]?.trajectories;
    const each = trajectories?.[event.index];
    if (event.type === "round_started") this.start(event);
    else if (event.type === "progress") this.progress(trajectories ?? [], event.tokens);
    else if (event.type === "attempt_failed") {
      each.attempts.push(event);
      Object.assign(each, { state: "waiting", output_tokens: 0, start: this.now });
    } else if (event.type === "trajectory_ended") end(each, event, this.trace.rounds[event.round].is_final);
    else if (event.type === "done") this.finish(event);
    this.refresh();
  }

  start({ round: number, is_final: isFinal, width, references, seconds: start }) {
    const sources = this.trace.rounds[number - 1]?.trajectories ?? [];
    const given = references.map(({ index }) => index);
    const round = {
      number,
      is_final: isFinal,
      has_own_references: false,
      references: references.map(({ index, was_cut: wasCut }) => {
        const isWhole = !wasCut || sources[index]?.state === "tail";
        return { index, state: isWhole ? "whole" : "shortened" };
      }),
      left_out: sources.filter((each) => hasMessage(each) && !given.includes(each.index)).map(({ index }) => index),
      trajectories: Array.from(Array(width), (_, index) => ({ ...BLANK, round: number, index, start, attempts: [] })),
    };
    this.trace.rounds.push(round);
    this.addGroup(round);
  }

  progress(trajectories, tokens) {
    for (const each of trajectories.filter(({ index, seconds }) => index in tokens && seconds === null)) {
      each.output_tokens = tokens[each.index];
      each.state = each.output_tokens ? "running" : "waiting";
    }
  }

  finish({ answered_by: answeredBy, seconds, chosen }) {
    this.trace.seconds = seconds;
    if (answeredBy === "synthesis") this.trace.chosen = [this.trace.rounds.length - 1, 0];
    else {
      this.trace.chosen = chosen ?? null;
      this.note.hidden = false;
      this.note.textContent = `Answered by ${ANSWERED_BY[answeredBy]}.`;
    }
  }

  // The answer ended, for any reason.
  stop() {
    this.trace.seconds ??= this.now;
    for (const each of this.trace.rounds.flatMap(({ trajectories }) => trajectories)) {
      if (each.seconds !== null) continue;
      Object.assign(each, { state: "stopped", seconds: Math.max(0, this.trace.seconds - each.start) });
    }
    this.refresh();
  }

  refresh() {
    super.refresh(this.trace.seconds ?? this.now);
    const { opened } = this;
    if (!opened || opened.row.ariaLabel === opened.shown) return;
    opened.shown = opened.row.ariaLabel; // changes whenever the card does
    this.reading.replaceChildren(this.card(opened.each));
  }

  open(each) {
    const before = this.opened?.row;
    const row = this.groups[each.round].rows[each.index];
    before?.setAttribute("aria-expanded", "false");
    row.setAttribute("aria-expanded", String(row !== before));
    row.setAttribute("aria-controls", this.reading.id);
    this.opened = row === before ? null : { each, row };
    if (this.opened) row.after(this.reading);
    else this.reading.remove();
    this.refresh();
  }

  // A citation leads to the trajectory behind the reference.
  follow(number, source) {
    const row = this.groups[number - 1]?.rows[source];
    if (row && this.opened?.row !== row) row.click();
    row?.focus();
  }
}

// Converts the server's event to the trace form. For a final trajectory it has only counts.
function end(each, event, isFinal) {
  const content = event.content ?? "";
  const at = content.lastIndexOf("</think>"); // a server may leave the reasoning in the content
  const inside = at < 0 ? "" : content.slice(0, at).replace("<think>", "");
  const message = content.slice(at < 0 ? 0 : at + 8).trim();
  const reasoning = (event.reasoning_content || inside).trim();
  const calls = event.tool_calls ?? [];
  const isTail = !isFinal && !message && !calls.length;
  const left = event.finish_reason !== "length" ? "ok" : isTail ? "tail" : "cut";
  const state = event.loss ?? left;
  Object.assign(each, event, {
    state,
    message: message ? [message] : [],
    passed_on: state === "tail" ? event.message : null,
    reasoning: reasoning ? [reasoning] : [],
    tool_calls: calls.map(({ function: { name, arguments: given } }) => ({ name, arguments: given })),
    citations: Object.fromEntries(Object.entries(event.cites).map(([label, count]) => [label, [count]])),
  });
}
