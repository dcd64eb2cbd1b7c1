"use strict";
// Lays out the data of a trace. Whatever a model or a problem says becomes textContent, never HTML.

const trace = JSON.parse(document.getElementById("data").textContent);

const STATES = {
  ok: "answered",
  cut: "answer cut off",
  tail: "end of its thought only",
  empty: "empty",
  truncated: "cut off in its thought",
  error: "error",
  timeout: "timed out",
  cancelled: "not waited for",
};
const LOST = new Set(["empty", "truncated", "error", "timeout", "cancelled"]);
const ANSWERED_BY = {
  synthesis: "synthesis",
  agreement: "agreement of a round",
  vote: "vote",
  score: "score",
  fallback: "fallback: the final call gave nothing",
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "click") element.addEventListener("click", value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Numbers as they are read.

const whole = (number) => number.toLocaleString("en");
const plural = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;

function short(number) {
  if (number < 1000) return String(number);
  return number < 1e6 ? `${(number / 1e3).toFixed(number < 1e4 ? 1 : 0)}k` : `${(number / 1e6).toFixed(2)}M`;
}

function time(seconds) {
  if (seconds === null) return "?";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const all = Math.round(seconds);
  const [hours, minutes] = [Math.floor(all / 3600), Math.floor((all % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${all % 60} s`;
}

const speed = (each) => (each.seconds > 0 ? `${whole(Math.round(each.output_tokens / each.seconds))} tokens/s` : null);

// Names: rounds and trajectories count from 1, as the references in a prompt do.

function roundName(number) {
  if (!trace.rounds[number].is_final) return `Round ${number + 1}`;
  return trace.rounds.length > 1 ? "Final synthesis" : "The only call";
}

function nameOf(number, index) {
  const round = trace.rounds[number];
  if (!round.is_final) return `${number + 1}.${index + 1}`;
  return round.trajectories.length > 1 ? `final.${index + 1}` : "final";
}

const cardId = (number, index) => `t${number}-${index}`;
const isChosen = (number, index) => trace.chosen && trace.chosen[0] === number && trace.chosen[1] === index;
const byIndex = (number, index) => trace.rounds[number]?.trajectories.find((each) => each.index === index);

// A source is what a reference was made of: a trajectory of the round before, or a message that the problem came with.
// It has one label in a round, but for rounds in which each trajectory has references of its own.

const sourceName = (number, source) => (number ? nameOf(number - 1, source) : `given message ${source + 1}`);
const sourceId = (number, source) => `r${number}-${source}`;
const sourceOf = (number, index, label) => byIndex(number, index)?.references[label - 1];

function labelOf(number, source) {
  const round = trace.rounds[number];
  return round.has_own_references ? sourceName(number, source) : `Reference ${round.references.findIndex((each) => each.index === source) + 1}`;
}

// A light on a source and on all places that cite it.

let lit = null;

function light(number, source) {
  const same = lit && lit[0] === number && lit[1] === source;
  darken();
  if (same) return;
  lit = [number, source];
  const reference = document.getElementById(sourceId(number, source));
  const card = number ? document.getElementById(cardId(number - 1, source)) : null;
  const elements = [reference, card, card && document.getElementById(`bar-${card.id}`)];
  elements.push(...document.querySelectorAll(`[data-cites="${number}-${source}"]`));
  for (const element of elements) element?.classList.add("lit");
  const round = roundName(number).toLowerCase();
  const said = trace.rounds[number].has_own_references
    ? `Trajectory ${sourceName(number, source)} has labels of its own in each call of ${round}.`
    : `${labelOf(number, source)} of ${round} is ${number ? "trajectory " : ""}${sourceName(number, source)}.`;
  const panel = document.getElementById("lit");
  panel.replaceChildren(
    make("span", { text: said }),
    make("span", { class: "buttons" },
      make("button", { type: "button", text: "Show reference", click: () => show(reference) }),
      card && make("button", { type: "button", text: "Show trajectory", click: () => show(card) }),
      make("button", { type: "button", text: "Close", click: darken }),
    ),
  );
  panel.hidden = false;
}

function darken() {
  lit = null;
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  document.getElementById("lit").hidden = true;
}

function show(element) {
  for (let outer = element.parentElement; outer; outer = outer.parentElement) if (outer.localName === "details") outer.open = true;
  element.scrollIntoView({ block: "center" });
  element.focus({ preventScroll: true });
}

addEventListener("keydown", (event) => event.key === "Escape" && darken());

// Texts.

function textOf(parts, number, index) {
  const element = make("div", { class: "text" });
  for (const part of parts) {
    if (typeof part === "string") element.append(part);
    else element.append(citation(part[1], number, sourceOf(number, index, part[0])));
  }
  return element;
}

const citation = (text, number, source, attributes = {}) =>
  make("button", { type: "button", class: "cite", text, "data-cites": `${number}-${source}`, click: () => light(number, source), ...attributes });

// Folded, and laid out only when it is opened: thoughts are long.
function folded(title, content, attributes = {}) {
  const details = make("details", attributes, make("summary", { text: title }));
  details.addEventListener("toggle", () => details.open && details.children.length === 1 && details.append(content()), false);
  return details;
}

// A region that scrolls by itself can be reached by keyboard.
const scrolling = (element) => (element.setAttribute("tabindex", "0"), element.classList.add("scrolling"), element);

function thoughtOf(each, number, index) {
  if (!each.thought.length) return null;
  const length = each.thought.reduce((sum, part) => sum + (typeof part === "string" ? part : part[1]).length, 0);
  return folded(`Thought, ${plural(length, "character")}`, () => scrolling(textOf(each.thought, number, index)), { class: "thought" });
}

const callsOf = (calls) =>
  calls.map((call) => make("div", { class: "call" }, make("strong", { text: `calls ${call.name}` }), make("pre", { text: call.arguments })));

const pill = (kind, text) => make("span", { class: `pill ${kind}`, text });
const facts = (list) =>
  make("dl", { class: "facts" }, list.filter(([, value]) => value !== null && value !== undefined && value !== "").map(
    ([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
  ));
const section = (id, title, ...children) => make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title`, text: title }), ...children);
const counted = (counts, names = {}) =>
  Object.entries(counts).map(([name, count]) => `${whole(count)} ${names[name] ?? name.replaceAll("_", " ")}`).join(", ");

// Sections.

function header() {
  const totals = trace.totals;
  const verdict = trace.correct === true ? pill("right", "right") : trace.correct === false ? pill("wrong", "wrong") : pill("", "not judged");
  const links = [["answer", trace.error ? "Error" : "Answer"], ["problem", "Problem"]];
  if (trace.rounds.length) links.push(["timeline", "Timeline"]);
  for (const round of trace.rounds) links.push([`round${round.number}`, roundName(round.number)]);
  return [
    make("div", { class: "title" },
      make("h1", { text: trace.title }),
      trace.error ? pill("wrong", "failed") : verdict,
    ),
    facts([
      ["problem", trace.title.includes(trace.id) ? null : trace.id],
      ["sample", trace.sample ? String(trace.sample) : null],
      ["schedule", `[${trace.rounds.filter((round) => !round.is_final).map((round) => round.trajectories.length).join(", ")}]`
        + (trace.rounds.some((round) => round.is_final) ? " + 1" : "")],
      ["answered by", ANSWERED_BY[trace.answered_by] ?? trace.answered_by],
      ["answer is of", trace.chosen && trace.rounds[trace.chosen[0]] ? nameOf(...trace.chosen) : null],
      ["calls", whole(totals.calls)],
      ["tries that failed", whole(totals.retries)],
      ["output tokens (TTC)", whole(totals.output_tokens)],
      ["lost tokens", whole(totals.lost_tokens)],
      ["prompt tokens", whole(totals.prompt_tokens)],
      ["of them shared", whole(totals.shared_tokens)],
      ["time", time(trace.seconds)],
      ["time of all calls", time(totals.seconds)],
      ["ended by", counted(totals.finish_reasons)],
    ]),
    ...trace.notes.map((text) => make("p", { class: "warning", text })),
    make("nav", { "aria-label": "Parts of the page" }, links.map(([id, text]) => make("a", { href: `#${id}`, text }))),
  ];
}

function answer() {
  if (trace.error) return section("answer", "No answer", make("p", { class: "error text", text: trace.error }));
  const made = trace.answer;
  const message = made.message.length ? textOf(made.message, ...trace.chosen) : made.tool_calls.length ? null : make("p", { class: "quiet", text: "empty" });
  return section("answer", "Answer",
    make("div", { class: "panel" },
      message,
      callsOf(made.tool_calls),
      made.finish_reason === "length" ? make("p", { class: "warning", text: "It is cut off: no tokens were left." }) : null,
      thoughtOf(made, ...trace.chosen),
    ),
    trace.problem.ground_truth !== null ? make("p", { class: "truth" }, make("span", { class: "quiet", text: "Should be " }), make("span", { class: "text", text: trace.problem.ground_truth })) : null,
  );
}

function problem() {
  const { messages, tools, extra } = trace.problem;
  const items = (message) => message.items.map((item) => {
    if (item.image) return make("img", { src: item.image, alt: item.name, title: item.name });
    return item.note ? make("p", { class: "quiet text", text: item.note }) : make("div", { class: "text", text: item.text });
  });
  return section("problem", "Problem",
    messages.map((message) => make("article", { class: "panel message" }, make("h3", { class: "role", text: message.role }), items(message), callsOf(message.tool_calls))),
    tools.length ? make("p", { class: "quiet", text: `Tools: ${tools.join(", ")}` }) : null,
    Object.keys(extra).length ? folded("Other fields of the record", () => facts(Object.entries(extra)), { class: "more" }) : null,
  );
}

// Timeline: a row for each call, as wide as the whole of the problem took.

function describe(number, each) {
  const said = [`${nameOf(number, each.index)}: ${STATES[each.state]}`, plural(each.output_tokens, "token"), time(each.seconds), speed(each)];
  if (each.finish_reason) said.push(`ended by ${each.finish_reason}`);
  if (each.earlier) said.push(`${plural(each.earlier, "failed try").replace("trys", "tries")} before`);
  said.push(`from ${time(each.start)}`);
  return said.filter(Boolean).join(" \u00b7 ");
}

function timeline() {
  const calls = trace.rounds.flatMap((round) => round.trajectories);
  const end = Math.max(trace.seconds ?? 0, ...calls.map((each) => (each.start ?? 0) + (each.seconds ?? 0)), 0.001);
  const rough = end / 7;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = rough > 30 ? [60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400] : [1, 2, 5, 10].map((each) => each * power);
  const step = steps.find((each) => each >= rough) ?? Math.ceil(rough / 3600) * 3600;
  const share = (seconds) => `${Math.max(0, (100 * seconds) / end)}%`;
  const hint = "Point at a bar, or go through them with the arrow keys; Enter shows the trajectory.";
  const readout = make("p", { id: "readout", class: "quiet", text: hint });
  const rows = [];

  function rowOf(number, each) {
    const track = make("span", { class: "track" });
    // When a failed try began is not recorded: it is drawn right before the next one.
    let before = each.start;
    for (const attempt of each.attempts.slice(0, each.earlier).reverse()) {
      const bar = make("span", { class: `bar try ${attempt.status}` });
      bar.style.left = share(before - attempt.seconds);
      bar.style.width = share(Math.min(attempt.seconds, before));
      before = Math.max(0, before - attempt.seconds);
      track.append(bar);
    }
    const bar = make("span", { class: `bar ${each.state}${isChosen(number, each.index) ? " chosen" : ""}` });
    bar.style.left = share(each.start);
    bar.style.width = share(each.seconds);
    const note = make("span", { class: "note", text: short(each.output_tokens) });
    const ends = (each.start + each.seconds) / end;
    if (ends < 0.88) note.style.left = `calc(${share(each.start + each.seconds)} + 4px)`;
    else note.classList.add("inside"), (note.style.right = `calc(${100 - 100 * ends}% + 4px)`);
    track.append(bar, note);
    const row = make("a", {
      class: "row", id: `bar-${cardId(number, each.index)}`, href: `#${cardId(number, each.index)}`, tabindex: rows.length ? "-1" : "0",
      "aria-label": describe(number, each),
    }, make("span", { class: "name", text: nameOf(number, each.index) }), track);
    const tell = () => (readout.textContent = describe(number, each));
    row.addEventListener("pointerenter", tell);
    row.addEventListener("focus", () => (tell(), focusable(row)));
    row.addEventListener("click", (event) => (event.preventDefault(), show(document.getElementById(cardId(number, each.index)))));
    rows.push(row);
    return row;
  }

  const focusable = (row) => rows.forEach((each) => each.setAttribute("tabindex", each === row ? "0" : "-1"));
  const chart = make("div", { class: `chart ${calls.length > 64 ? "dense" : ""}` },
    trace.rounds.map((round) => make("div", { class: "group", role: "group", "aria-label": roundName(round.number) },
      make("h3", {}, `${roundName(round.number)} `, make("span", { class: "quiet", text: summary(round) })),
      round.trajectories.map((each) => rowOf(round.number, each)),
    )));
  chart.style.setProperty("--step", share(step));
  chart.addEventListener("keydown", (event) => {
    const at = rows.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (at < 0 || to === undefined || !rows[to]) return;
    event.preventDefault();
    rows[to].focus();
  });
  const ticks = make("span", { class: "track" });
  for (let at = 0; at <= end * 1.0001; at += step) {
    const tick = make("span", { class: "tick", text: step >= 60 ? (at < 3600 ? `${Math.round(at / 60)} min` : `${+(at / 3600).toFixed(2)} h`) : `${+at.toPrecision(6)} s` });
    if (at / end > 0.87) tick.classList.add("last");
    tick.style.left = share(at);
    ticks.append(tick);
  }
  chart.append(make("div", { class: "row axis", "aria-hidden": "true" }, make("span", { class: "name" }), ticks));

  const present = new Set(calls.map((each) => each.state));
  const legend = make("ul", { class: "legend" },
    Object.keys(STATES).filter((state) => present.has(state)).map((state) => make("li", {}, make("span", { class: `bar ${state}` }), STATES[state])),
    calls.some((each) => each.earlier) ? make("li", {}, make("span", { class: "bar try" }), "a try that failed") : null,
    trace.chosen ? make("li", {}, make("span", { class: "bar ok chosen" }), "the answer") : null,
  );
  return section("timeline", "Timeline", legend, readout, chart,
    make("p", { class: "quiet", text: "Numbers beside bars are output tokens. A bar is the last try of a call; earlier tries stand right before it, for when they began is not recorded." }));
}

function summary(round) {
  const lost = round.trajectories.filter((each) => LOST.has(each.state)).length;
  const said = [plural(round.trajectories.length, "call"), `${short(round.totals.output_tokens)} tokens`];
  if (lost) said.push(`${whole(lost)} lost`);
  return said.join(", ");
}

// Rounds.

function references(round) {
  const { number } = round;
  if (!round.references.length) return make("p", { class: "quiet no-references", text: "Its prompt is the problem itself, without references." });
  const marks = { shortened: "shortened to its end", tail: "end of a thought" };
  const items = round.references.map((reference) => {
    const source = reference.index;
    return make("li", { id: sourceId(number, source), class: "reference", tabindex: "-1" },
      citation(labelOf(number, source), number, source),
      round.has_own_references ? null : make("span", { class: "quiet", text: `\u2190 ${sourceName(number, source)}` }),
      reference.state !== "whole" ? pill("cut", marks[reference.state]) : null,
      make("span", { class: "quiet", text: reference.cited_by ? `cited by ${whole(reference.cited_by)}` : "not cited" }),
      folded("Text", () => scrolling(make("div", { class: "text", text: reference.text }))),
    );
  });
  const dropped = round.left_out.map((index) =>
    make("li", { class: "reference dropped" }, make("strong", { text: sourceName(number, index) }), pill("lost", "left out: did not fit the prompt")));
  return make("details", { class: "references", open: true },
    make("summary", {}, make("h3", { text: `${round.has_own_references ? "References, each call has some of them" : "References in the order of the prompt"} (${whole(round.references.length)})` })),
    make("ol", {}, items, dropped));
}

function matrix(round) {
  const cited = round.trajectories.filter((each) => Object.keys(each.citations).length);
  if (!cited.length || round.references.length < 2) return null;
  const { number } = round;
  const most = Math.max(...cited.flatMap((each) => Object.values(each.citations).map(([message, thought]) => message + thought)));
  const head = round.references.map(({ index: source }, i) =>
    make("th", { scope: "col", "data-cites": `${number}-${source}` },
      citation(round.has_own_references ? labelOf(number, source) : String(i + 1), number, source, { "aria-label": labelOf(number, source) })));
  const cell = (each, source) => {
    const label = each.references.indexOf(source) + 1;
    const [message, thought] = each.citations[label] ?? [0, 0];
    const count = message + thought;
    const made = make("td", {
      "data-cites": `${number}-${source}`, class: count ? "some" : null, text: count ? String(count) : label ? "\u00b7" : "",
      title: label
        ? `${nameOf(number, each.index)} cites reference ${label}: ${message} times in its message, ${thought} in its thought`
        : `${nameOf(number, each.index)} has not seen ${sourceName(number, source)}`,
    });
    if (count) made.style.setProperty("--heat", `${Math.round(15 + (60 * count) / most)}%`);
    return made;
  };
  const rows = round.trajectories.map((each) => make("tr", {},
    make("th", { scope: "row" }, make("a", { href: `#${cardId(number, each.index)}`, text: nameOf(number, each.index) })),
    round.references.map(({ index: source }) => cell(each, source))));
  return make("details", { class: "matrix", open: true },
    make("summary", {}, make("h3", { text: "Citations, in messages and thoughts" })),
    scrolling(make("div", { class: "wide", role: "region", "aria-label": "Citations" },
      make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "cites" }), head)), make("tbody", {}, rows)))));
}

// Which references of the next round a trajectory became.
function becomes(number, index) {
  const next = trace.rounds[number + 1];
  if (!next?.references.some((each) => each.index === index)) return null;
  const round = roundName(number + 1).toLowerCase();
  if (!next.has_own_references) {
    return make("p", { class: "cites" }, make("span", { class: "quiet", text: "is " }), citation(labelOf(number + 1, index), number + 1, index),
      make("span", { class: "quiet", text: ` of ${round}` }));
  }
  const seen = next.trajectories.filter((each) => each.references.includes(index)).map((each) => nameOf(number + 1, each.index));
  return make("p", { class: "cites" }, make("span", { class: "quiet", text: "seen by " }), citation(seen.join(", "), number + 1, index));
}

function card(round, each) {
  const { number } = round;
  const name = nameOf(number, each.index);
  const cites = Object.entries(each.citations);
  const line = [plural(each.output_tokens, "token"), time(each.seconds), speed(each), each.finish_reason];
  const attempts = each.attempts.map((attempt) =>
    make("li", { class: "text", text: `${STATES[attempt.status] ?? attempt.status} after ${time(attempt.seconds)}${attempt.output_tokens ? `, ${plural(attempt.output_tokens, "token")} lost` : ""}: ${attempt.error}` }));
  const dropped = trace.rounds[number + 1]?.left_out.includes(each.index);
  return make("article", { id: cardId(number, each.index), class: `card ${LOST.has(each.state) ? "lost" : each.state}`, tabindex: "-1", "aria-label": `Trajectory ${name}` },
    make("header", {},
      make("h4", { text: name }),
      isChosen(number, each.index) ? pill("chosen", "the answer") : null,
      each.state === "ok" ? null : pill(LOST.has(each.state) ? "lost" : "cut", STATES[each.state]),
      each.correct === true ? pill("right", "right") : each.correct === false ? pill("wrong", "wrong") : null,
      each.answer ? make("span", { class: "short", text: each.answer, title: "the answer found in the message" }) : null,
    ),
    make("p", { class: "quiet", text: line.filter(Boolean).join(" \u00b7 ") }),
    each.error ? make("p", { class: "error text", text: each.error }) : null,
    each.message.length ? scrolling(textOf(each.message, number, each.index)) : null,
    callsOf(each.tool_calls),
    each.passed_on ? make("div", { class: "passed" }, make("p", { class: "quiet", text: "Passed on, the end of its thought:" }), scrolling(make("div", { class: "text", text: each.passed_on }))) : null,
    thoughtOf(each, number, each.index),
    round.has_own_references ? make("p", { class: "cites" }, make("span", { class: "quiet", text: "sees " }), each.references.map((source, i) =>
      citation(`${i + 1} \u2190 ${sourceName(number, source)}`, number, source))) : null,
    cites.length ? make("p", { class: "cites" }, make("span", { class: "quiet", text: "cites " }), cites.map(([label, [message, thought]]) =>
      citation(`${label}${message + thought > 1 ? ` \u00d7${message + thought}` : ""}`, number, sourceOf(number, each.index, Number(label)),
        { "aria-label": `Reference ${label}, ${message} times in the message, ${thought} in the thought` }))) : null,
    becomes(number, each.index),
    dropped ? make("p", { class: "quiet", text: `left out of ${roundName(number + 1).toLowerCase()}: did not fit the prompt` }) : null,
    attempts.length ? make("details", { class: "more" }, make("summary", { text: plural(attempts.length, "failed try").replace("trys", "tries") }), make("ul", {}, attempts)) : null,
    folded("Details", () => facts([
      ["in the records", `round ${number}, index ${each.index}`],
      ["seed", String(each.seed)],
      ["start", time(each.start)],
      ["prompt tokens", whole(each.prompt_tokens)],
      ["of them shared", whole(each.cached_tokens)],
      ["mean log-probability", each.mean_logprob === null ? null : each.mean_logprob.toFixed(3)],
    ]), { class: "more" }),
  );
}

function roundOf(round) {
  const { did_not_fit: dropped, ...losses } = round.losses;
  const lost = Object.keys(losses).length ? `Lost: ${counted(losses, STATES)}.` : "";
  const cut = [
    dropped ? `${plural(dropped, "reference")} left out: did not fit the prompt` : null,
    round.cut_references ? `${plural(round.cut_references, "reference")} shortened to fit the prompt` : null,
    round.cut_answers ? `${plural(round.cut_answers, "answer")} cut off by the limit of tokens, passed on all the same` : null,
  ].filter(Boolean).join("; ");
  const totals = round.totals;
  const said = [
    plural(round.trajectories.length, "call"), `${whole(totals.output_tokens)} output tokens`,
    `${whole(totals.prompt_tokens)} prompt tokens, ${whole(totals.shared_tokens)} of them shared`,
    totals.retries ? plural(totals.retries, "failed try").replace("trys", "tries") : null,
    totals.lost_tokens ? `${whole(totals.lost_tokens)} tokens lost with them` : null,
    `ended by ${counted(totals.finish_reasons)}`,
  ].filter(Boolean).join(" \u00b7 ");
  return section(`round${round.number}`, roundName(round.number),
    make("p", { class: "quiet", text: said }),
    lost || cut ? make("p", { class: "warning", text: [lost, cut && `${cut}.`].filter(Boolean).join(" ") }) : null,
    round.answers.length > 1 || (round.answers.length && round.trajectories.length > 1)
      ? make("ul", { class: "answers", "aria-label": "Answers" }, round.answers.map(([text, count]) => make("li", {}, make("span", { class: "text", text }), make("strong", { text: `\u00d7${count}` }))))
      : null,
    references(round),
    matrix(round),
    make("div", { class: `cards ${round.trajectories.length === 1 ? "one" : ""}` }, round.trajectories.map((each) => card(round, each))),
  );
}

document.getElementById("top").append(...header().filter(Boolean));
document.getElementById("main").append(
  answer(),
  problem(),
  ...(trace.rounds.length ? [timeline()] : []),
  ...trace.rounds.map(roundOf),
);
if (!trace.has_thoughts) document.getElementById("main").append(make("p", { class: "quiet", text: "This page was made without the chains of thought." }));
// Long messages are cut short until asked for. First all are measured, then changed.
const long = [...document.querySelectorAll(".card > .scrolling")].filter((text) => text.scrollHeight > text.clientHeight + 40);
for (const text of long) {
  const button = make("button", { type: "button", class: "more-text", text: "Show all", "aria-expanded": "false", click: () => {
    const isOpen = text.classList.toggle("open");
    button.textContent = isOpen ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(isOpen));
  } });
  text.after(button);
}
// What the address names was not there when the page was read.
if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
