// A saved page: a problem's trace, or the table of a run's problems.

import { facts, folded, make, pill, plural, quiet, scrolling, short, time, toolCalls, whole } from "./elements.js";
import { ANSWERED_BY, Rounds, STATES, rightOrWrong, timesOf } from "./rounds.js";

const $ = (id) => document.getElementById(id);

class SavedTrace extends Rounds {
  lit = null; // [round, source] whose citations are lit

  open(each) {
    show($(this.idOf(each)));
  }

  // Highlights a source and all its citations.
  follow(number, source) {
    const same = this.lit?.[0] === number && this.lit[1] === source;
    this.darken();
    if (same) return;
    this.lit = [number, source];
    const reference = $(`r${number}-${source}`);
    const card = number ? $(this.idOf({ round: number - 1, index: source })) : null;
    const citing = document.querySelectorAll(`[data-cites="${number}-${source}"]`);
    for (const element of [reference, card, card && $(`bar-${card.id}`), ...citing]) element?.classList.add("lit");
    const round = this.roundName(number).toLowerCase();
    const name = `${number ? "trajectory " : ""}${this.sourceName(number, source)}`;
    const said = this.trace.rounds[number].has_own_references
      ? `Each call of ${round} has its own number for ${name}.`
      : `${this.labelOf(number, source)} of ${round} is ${name}.`;
    const button = (text, click) => make("button", { type: "button", text, click });
    $("lit").hidden = false;
    $("lit").replaceChildren(
      make("span", { text: said }),
      make("span", { class: "buttons" },
        button("Show reference", () => show(reference)),
        card && button("Show trajectory", () => show(card)),
        button("Close", () => this.darken()),
      ),
    );
  }

  darken() {
    this.lit = null;
    for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
    $("lit").hidden = true;
  }

  header() {
    const { title, id, sample, error, rounds, totals, chosen, answered_by: by, seconds } = this.trace;
    const widths = rounds.filter((round) => !round.is_final).map((round) => round.trajectories.length);
    const links = [["answer", error ? "Error" : "Answer"], ["problem", "Problem"]];
    if (rounds.length) links.push(["timeline", "Timeline"]);
    for (const { number } of rounds) links.push([`round${number}`, this.roundName(number)]);
    return [
      make("div", { class: "title" }, make("h1", { text: title }), verdict(this.trace)),
      facts([
        ["problem", title.includes(id) ? null : id],
        ["sample", sample ? String(sample) : null],
        ["schedule", `[${widths.join(", ")}]${rounds.some((round) => round.is_final) ? " + 1" : ""}`],
        ["answered by", ANSWERED_BY[by] ?? by],
        ["the answer is from", chosen && this.nameOf({ round: chosen[0], index: chosen[1] })],
        ["calls", whole(totals.calls)],
        ["failed attempts", whole(totals.retries)],
        ["output tokens (TTC)", whole(totals.output_tokens)],
        ["lost tokens", whole(totals.lost_tokens)],
        ["prompt tokens", whole(totals.prompt_tokens)],
        ["shared prompt tokens", whole(totals.shared_tokens)],
        ["time", time(seconds)],
        ["time of all calls", time(totals.seconds)],
        ["ended by", counted(totals.finish_reasons)],
      ]),
      make("nav", { "aria-label": "Parts of the page" },
        links.map(([to, text]) => make("a", { href: `#${to}`, text })),
        make("button", { type: "button", text: "Show full messages", "aria-pressed": "false", click: toggleWhole }),
      ),
    ];
  }

  answer() {
    const { error, chosen, rounds, problem } = this.trace;
    if (error) return section("answer", "No answer", make("p", { class: "error text", text: error }));
    const each = rounds[chosen[0]].trajectories[chosen[1]];
    return section("answer", "Answer",
      make("div", { class: "panel" },
        this.written(each),
        each.finish_reason === "length" && make("p", { class: "warning", text: "Cut off at the token limit." }),
      ),
      problem.ground_truth !== null && make("p", { class: "truth" },
        quiet("Expected: "), make("span", { class: "text", text: problem.ground_truth })),
    );
  }

  problem() {
    const { messages, tools, extra } = this.trace.problem;
    const item = ({ image, name, note, text }) => {
      if (image) return make("img", { src: image, alt: name, title: name });
      return note ? make("p", { class: "quiet text", text: note }) : make("div", { class: "text", text });
    };
    return section("problem", "Problem",
      messages.map(({ role, items, tool_calls: calls }) => make("article", { class: "panel message" },
        make("h3", { class: "role", text: role }), items.map(item), toolCalls(calls))),
      tools.length ? quiet(`Tools: ${tools.join(", ")}`, "p") : null,
      Object.keys(extra).length
        ? folded("Other fields of the record", () => facts(Object.entries(extra)), { class: "more" })
        : null,
    );
  }

  timeline() {
    const hint = "Numbers: output tokens. Hatched: failed attempts, up to the start of the next one. "
      + "Arrow keys move between rows; Enter opens the trajectory.";
    return section("timeline", "Timeline", this.chart, quiet(hint, "p"));
  }

  round(round) {
    const { trajectories, totals, answers } = round;
    const { did_not_fit: leftOut, ...losses } = round.losses;
    const warnings = [
      Object.keys(losses).length ? `Lost: ${counted(losses, STATES)}.` : null,
      leftOut ? `${plural(leftOut, "reference")} left out: did not fit the prompt.` : null,
      round.cut_references ? `${plural(round.cut_references, "reference")} shortened to fit the prompt.` : null,
      round.cut_answers ? `${plural(round.cut_answers, "answer")} cut off by the token limit, but passed on.` : null,
    ].filter(Boolean);
    const said = [
      plural(trajectories.length, "call"),
      `${whole(totals.output_tokens)} output tokens`,
      `${whole(totals.prompt_tokens)} prompt tokens (${whole(totals.shared_tokens)} shared)`,
      totals.retries ? plural(totals.retries, "failed attempt") : null,
      totals.lost_tokens ? `${whole(totals.lost_tokens)} tokens lost with them` : null,
      `ended by ${counted(totals.finish_reasons)}`,
    ];
    return section(`round${round.number}`, this.roundName(round.number),
      quiet(said.filter(Boolean).join(" \u00b7 "), "p"),
      warnings.length ? make("p", { class: "warning", text: warnings.join(" ") }) : null,
      answers.length && trajectories.length > 1
        ? make("ul", { class: "tally", "aria-label": "Answers" }, answers.map(([text, count]) =>
          make("li", {}, make("span", { class: "text", text }), make("strong", { text: `\u00d7${count}` }))))
        : null,
      this.references(round),
      make("div", { class: "cards" }, trajectories.map((each) => this.card(each))),
    );
  }

  // A row for each reference, in prompt order; a column for each trajectory, with its citation counts.
  references({ number, references, trajectories, has_own_references: hasOwn, left_out: leftOut }) {
    if (!references.length) return quiet("The prompt is the problem without references.", "p");
    const most = Math.max(1, ...trajectories.flatMap((each) => Object.values(each.citations).map(([times]) => times)));
    const cell = (each, index) => {
      const counts = this.citationsOf(each, index);
      const label = this.sourcesOf(each).indexOf(index) + 1;
      const name = this.nameOf(each);
      return make("td", {
        "data-cites": `${number}-${index}`,
        class: counts[0] ? "some" : null,
        "--heat": `${Math.round(15 + (60 * counts[0]) / most)}%`,
        title: label ? `${name} cites reference ${label} ${timesOf(counts)}` : `${name} does not see it`,
        text: counts[0] ? String(counts[0]) : label ? "\u00b7" : "",
      });
    };
    const row = ({ index, state, text }) =>
      make("tr", { id: `r${number}-${index}`, class: "reference", tabindex: "-1" },
        make("th", { scope: "row" },
          this.citation(this.labelOf(number, index), number, index),
          hasOwn ? null : quiet(`\u2190 ${this.sourceName(number, index)}`),
          state === "whole" ? null : pill("cut", state === "tail" ? "end of its reasoning" : "shortened to its end"),
          folded("text", () => make("div", { class: "text", text }), { class: "more" }),
        ),
        trajectories.map((each) => cell(each, index)));
    const dropped = (index) => make("tr", { class: "dropped" },
      make("th", { scope: "row" }, this.sourceName(number, index), pill("lost", "left out: did not fit the prompt")));
    const heads = trajectories.map((each) =>
      make("th", { scope: "col" }, make("a", { href: `#${this.idOf(each)}`, text: this.nameOf(each) })));
    const title = `References${hasOwn ? ", each call sees some of them" : ""} (${whole(references.length)})`;
    return make("details", { class: "references", open: true },
      make("summary", {}, make("h3", { text: title })),
      scrolling(make("div", { class: "wide", role: "region", "aria-label": "References" },
        make("table", {},
          make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "citations by" }), heads)),
          make("tbody", {}, references.map(row), leftOut.map(dropped))))));
  }
}

const verdict = ({ error, correct }) =>
  (error ? pill("wrong", "failed") : rightOrWrong(correct) ?? pill("", "not judged"));

function section(id, title, ...children) {
  const head = make("h2", { id: `${id}-title`, text: title });
  return make("section", { id, "aria-labelledby": head.id }, head, ...children);
}

const counted = (counts, names = {}) =>
  Object.entries(counts).map(([name, count]) => `${count} ${names[name] ?? name.replaceAll("_", " ")}`).join(", ");

function show(element) {
  element.closest("details")?.setAttribute("open", "");
  element.scrollIntoView({ block: "center" });
  element.focus({ preventScroll: true });
}

// Toggles long messages between scrolling and full height.
function toggleWhole({ target }) {
  target.setAttribute("aria-pressed", String(document.body.classList.toggle("unclipped")));
}

// The table of a run: {title, facts, answers: [{page, name, correct, answer, truth, ...}]}.
function table(run) {
  const heads = ["problem", "", "answer", "expected", "answered by", "calls", "TTC", "time"];
  const rows = run.answers.map((each) => make("tr", {},
    make("th", { scope: "row" }, make("a", { href: each.page, text: each.name })),
    make("td", {}, verdict(each)),
    make("td", { text: each.answer }),
    make("td", { text: each.truth }),
    make("td", { text: ANSWERED_BY[each.answered_by] ?? each.answered_by ?? "" }),
    make("td", { class: "number", text: whole(each.calls) }),
    make("td", { class: "number", text: short(each.output_tokens) }),
    make("td", { class: "number", text: time(each.seconds) }),
  ));
  const head = heads.map((text, i) => make("th", { scope: "col", class: i > 4 ? "number" : null, text }));
  $("top").append(make("h1", { text: run.title }), facts(run.facts));
  $("main").append(make("div", { class: "problems wide", tabindex: "0", role: "region", "aria-label": "Answers" },
    make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows))));
}

function problem(data) {
  const trace = new SavedTrace(data);
  const { rounds, has_reasoning: hasReasoning } = data;
  $("top").append(...trace.header());
  $("main").append(trace.answer(), trace.problem());
  if (rounds.length) $("main").append(trace.timeline(), ...rounds.map((round) => trace.round(round)));
  if (!hasReasoning) $("main").append(quiet("This page was made without the reasoning.", "p"));
  trace.refresh();
  addEventListener("keydown", (event) => event.key === "Escape" && trace.darken());
  // The target of the URL's hash did not exist when the page loaded.
  if (location.hash.length > 1) $(location.hash.slice(1))?.scrollIntoView();
}

const data = JSON.parse($("data").textContent);
if (data.answers) table(data);
else problem(data);
