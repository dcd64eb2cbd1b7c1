// The rounds of PaCoRe behind an answer: for each a row of cells, one for a trajectory, which show what it has left.

import { make } from "./elements.js";

// In a cell, and said in full.
const LOSSES = {
  error: ["failed", "failed"],
  timeout: ["too long", "took too long"],
  cancelled: ["unneeded", "not waited for"],
  empty: ["empty", "wrote no answer"],
  truncated: ["cut off", "cut off within its thought"],
  stopped: ["stopped", "stopped"],
};
const SIGNS = { waiting: "\u00b7", running: "\u2026", done: "\u2713", lost: "\u2715" };
const ANSWERED_BY = {
  agreement: "Enough trajectories agreed: one of them is the answer.",
  fallback: "The final call gave nothing: the answer that most of the last round agree on stands in.",
};
let numRounds = 0; // on the page, for ids

export class Rounds {
  constructor() {
    this.rounds = new Map();
    this.note = make("p", { class: "quiet", hidden: "" });
    this.element = make("section", { class: "rounds", "aria-label": "Rounds of PaCoRe" }, this.note);
  }

  take(event) {
    if (event.type === "round_started") this.begin(event);
    else if (event.type === "progress") this.rounds.get(event.round)?.progress(event.tokens);
    else if (event.type === "attempt_failed") this.rounds.get(event.round)?.fail(event);
    else if (event.type === "trajectory_ended") this.rounds.get(event.round)?.end(event);
    else if (event.type === "round_ended") this.finish(event);
    else if (event.type === "done" && ANSWERED_BY[event.answered_by]) {
      this.note.hidden = false;
      this.note.textContent = ANSWERED_BY[event.answered_by];
    }
  }

  begin(event) {
    const round = new Round(event);
    this.rounds.set(event.round, round);
    this.note.before(round.element);
    const before = this.rounds.get(event.round - 1);
    event.references.forEach((reference, i) => before?.cells[reference.index]?.become(i + 1, reference.was_cut));
  }

  finish(event) {
    this.rounds.get(event.round)?.finish(event);
    const before = this.rounds.get(event.round - 1);
    for (const cell of before?.cells ?? []) cell.cite(event.cites[cell.reference]);
  }

  // The answer ended, whatever the reason: nothing goes on.
  stop() {
    for (const round of this.rounds.values()) round.stop();
  }
}

class Round {
  constructor({ round, is_final: isFinal, width }) {
    this.begun = performance.now();
    this.isFinal = isFinal;
    this.width = width;
    this.name = isFinal ? "Synthesis" : `Round ${round + 1}`;
    this.counts = make("span", { class: "quiet" });
    this.head = make("div", { class: "head" }, make("strong", { text: this.name }), this.counts);
    this.cells = Array.from({ length: width }, (_, index) => new Cell(this, index));
    this.element = make("div", { class: "round", role: "group", "aria-label": this.name }, this.head);
    if (!isFinal) {
      // The text of the final call is the answer itself, and stands below.
      this.row = make("div", { class: "cells", role: "group", "aria-label": `Trajectories of ${this.name}` });
      this.row.append(...this.cells.map((cell) => cell.element));
      this.row.onkeydown = (event) => this.move(event);
      this.cells[0].element.tabIndex = 0;
      this.reading = make("div", { class: "reading", id: `reading-${++numRounds}`, hidden: "" });
      this.element.append(this.row, this.reading);
      for (const cell of this.cells) cell.element.setAttribute("aria-controls", this.reading.id);
    }
    this.show();
  }

  progress(tokens) {
    for (const [index, count] of Object.entries(tokens)) this.cells[index]?.write(count);
    this.show();
  }

  fail(event) {
    this.cells[event.index]?.fail(event);
    this.show();
  }

  end(event) {
    this.cells[event.index]?.end(event);
    this.show();
  }

  finish({ totals, cites }) {
    this.seconds ??= (performance.now() - this.begun) / 1000;
    this.tokens = totals.output_tokens;
    this.cited = Object.keys(cites);
    this.show();
  }

  stop() {
    if (this.seconds !== undefined) return;
    this.seconds = (performance.now() - this.begun) / 1000;
    for (const cell of this.cells) cell.stop();
    this.show();
  }

  show() {
    const inState = (state) => this.cells.filter((cell) => cell.state === state).length;
    const tokens = this.tokens ?? this.cells.reduce((sum, cell) => sum + cell.tokens, 0);
    const seconds = this.seconds ?? (performance.now() - this.begun) / 1000;
    const parts = [];
    if (!this.isFinal) parts.push(`${inState("done")} of ${this.width} done`);
    else if (this.seconds === undefined) parts.push("writing");
    if (inState("lost")) parts.push(`${inState("lost")} lost`);
    parts.push(`${tokens.toLocaleString("en")} tokens`, `${seconds.toFixed(1)} s`);
    if (this.cited?.length) parts.push(`cites ${this.cited.length > 1 ? "references" : "reference"} ${this.cited.join(", ")}`);
    this.counts.textContent = parts.join(" \u00b7 ");
  }

  open(cell) {
    const isOpen = this.opened === cell;
    this.opened = isOpen ? null : cell;
    for (const each of this.cells) each.element.setAttribute("aria-expanded", String(each === this.opened));
    this.reading.hidden = isOpen;
    this.focus(cell);
    if (!isOpen) this.read();
  }

  read() {
    const text = make("div", { class: "text", tabindex: "0", text: this.opened.text() });
    this.reading.replaceChildren(make("p", { class: "quiet", text: this.opened.describe() }), text);
  }

  // One cell is a stop of the Tab key, the arrows lead to the others.
  move(event) {
    const at = this.cells.findIndex((cell) => cell.element === document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: this.width - 1 }[event.key];
    if (at < 0 || !this.cells[to]) return;
    event.preventDefault();
    this.focus(this.cells[to]);
    this.cells[to].element.focus();
  }

  focus(cell) {
    for (const each of this.cells) each.element.tabIndex = each === cell ? 0 : -1;
  }
}

class Cell {
  constructor(round, index) {
    this.round = round;
    this.index = index;
    this.tokens = this.retries = 0;
    this.sign = make("span", { class: "sign", "aria-hidden": "true" });
    this.count = make("span", { class: "count", "aria-hidden": "true" });
    this.badge = make("span", { class: "badge", "aria-hidden": "true", hidden: "" });
    this.element = make("button", { type: "button", tabindex: "-1", "aria-expanded": "false" });
    this.element.append(this.sign, this.count, this.badge);
    this.element.onclick = () => round.open(this);
    this.enter("waiting");
  }

  enter(state) {
    this.state = state;
    this.show();
  }

  write(tokens) {
    this.tokens = tokens;
    if (this.state === "waiting" || this.state === "running") this.enter(tokens ? "running" : "waiting");
  }

  fail(attempt) {
    this.retries += 1;
    this.error = attempt.error;
    this.tokens = 0;
    this.enter("waiting");
  }

  end(trajectory) {
    this.trajectory = trajectory;
    this.tokens = trajectory.output_tokens;
    this.enter(trajectory.loss === null ? "done" : "lost");
  }

  stop() {
    if (this.state !== "waiting" && this.state !== "running") return;
    this.isStopped = true;
    this.enter("lost");
  }

  become(reference, wasCut) {
    this.reference = reference;
    this.wasCut = wasCut;
    this.show();
  }

  cite(count) {
    if (!count) return;
    this.cites = count;
    this.badge.hidden = false;
    this.badge.textContent = `Ref ${this.reference}`;
    this.show();
  }

  show() {
    this.element.className = `cell ${this.state}${this.cites ? " cited" : ""}`;
    this.sign.textContent = `${this.index + 1} ${SIGNS[this.state]}`;
    this.count.textContent = this.state === "lost" ? this.reason()[0] : this.tokens ? short(this.tokens) : "";
    this.element.setAttribute("aria-label", this.describe());
    this.element.title = this.describe();
    if (this.round.opened === this) this.round.read();
  }

  reason() {
    return LOSSES[this.isStopped ? "stopped" : this.trajectory.loss] ?? ["lost", "lost"];
  }

  describe() {
    const parts = [`Trajectory ${this.index + 1}: ${this.state === "lost" ? this.reason()[1] : this.state}`];
    if (this.tokens) parts.push(`${this.tokens.toLocaleString("en")} tokens`);
    if (this.trajectory) parts.push(`${this.trajectory.seconds.toFixed(1)} s`);
    if (this.retries) parts.push(`tried ${this.retries + 1} times`);
    if (this.reference) parts.push(`Reference ${this.reference} of the next round${this.wasCut ? ", shortened" : ""}`);
    if (this.cites) parts.push(`cited ${this.cites === 1 ? "once" : `${this.cites} times`}`);
    return parts.join(", ");
  }

  text() {
    if (this.trajectory?.message) return this.trajectory.message;
    if (this.state === "lost") return this.trajectory?.error ?? this.error ?? "It left no message.";
    return this.error ? `It is tried again: ${this.error}` : "Its message comes when it is done.";
  }
}

function short(count) {
  return count < 1000 ? String(count) : `${(count / 1000).toFixed(count < 9950 ? 1 : 0)}k`;
}
