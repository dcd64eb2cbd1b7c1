"""What a trace shows of a problem, as plain JSON: the page itself only lays it out.

A text in which references are cited is a list of parts: a string, or [number, string] for a place that cites one.
"""

import base64
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import ImageError
from stepjax.pacore.answers import Matching, extract, grouped, judge
from stepjax.pacore.compaction import find_citations
from stepjax.pacore.records import Outcome, Problem, Reference, Round, Totals, Trajectory
from stepjax.processing.image_files import open_image

THUMBNAIL = 512  # pixels, the longer side
MOST_SHOWN = 1_000_000  # characters of one text
_CLOSE = "</think>"


def trace_data(
    of: Outcome,
    *,
    correct: bool | None = None,
    matching: Matching | None = None,
    thoughts: bool = True,
) -> dict[str, Any]:
    """See `trace.trace_html` for the arguments."""
    problem, rounds = of.problem, of.rounds
    chosen = of.chosen
    return {
        "id": problem.id,
        "sample": of.sample,
        "correct": correct,
        "error": of.error,
        "answered_by": of.answered_by,
        "chosen": chosen,
        "answer": None if chosen is None else _answer(of, thoughts),
        "seconds": of.seconds,
        "has_thoughts": thoughts,
        "totals": _totals(Totals.of(each for round_ in rounds for each in round_.trajectories)),
        "problem": _problem(problem),
        "rounds": [_round(problem, rounds, i, matching, thoughts) for i in range(len(rounds))],
    }


def _totals(totals: Totals) -> dict[str, Any]:
    return dataclasses.asdict(totals)


def _answer(outcome: Outcome, thoughts: bool) -> dict[str, Any]:
    number, index = outcome.chosen or (0, 0)
    count = len(_seen(index, outcome.rounds[number]))
    thought, text = _split(outcome.content, outcome.rollout.reasoning)
    return {
        "message": _parts(text, count),
        "thought": _parts(thought, count) if thoughts else [],
        "tool_calls": [_call(call) for call in outcome.rollout.tool_calls],
        "finish_reason": outcome.rollout.finish_reason,
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "messages": [_conversation_message(message) for message in problem.messages],
        "tools": [_name_of(tool) for tool in problem.tools],
        "ground_truth": None if problem.ground_truth is None else _as_text(problem.ground_truth),
        "extra": {str(name): _as_text(value) for name, value in problem.extra.items()},
    }


def _round(
    problem: Problem, rounds: Sequence[Round], number: int, matching: Matching | None, thoughts: bool
) -> dict[str, Any]:
    round_ = rounds[number]
    # The messages that its references were made of.
    before = rounds[number - 1].messages if number else [Reference(i, text) for i, text in enumerate(problem.responses)]
    sources = {message.index: message for message in before}
    references = _all_references(round_)
    shown = {reference.index for reference in references}
    trajectories = [_trajectory(each, round_, problem, matching, thoughts) for each in round_.trajectories]
    citing = Counter(index for each in trajectories for index in _cited_sources(each, round_))
    written = [each["answer"] or "" for each in trajectories]
    groups = [] if matching is None else grouped(written, matching)
    answers = Counter(group for group in groups if group is not None)
    return {
        "number": round_.number,
        "is_final": round_.is_final,
        "losses": dict(round_.losses),
        "cut_references": round_.cut_references,
        "cut_answers": round_.cut_answers,
        "totals": _totals(round_.totals),
        # In the order of their labels; where each trajectory has references of its own, by index.
        "references": [
            {
                "index": reference.index,
                "text": reference.text,
                "state": _reference_state(reference, sources.get(reference.index)),
                "cited_by": citing[reference.index],
            }
            for reference in references
        ],
        "has_own_references": bool(round_.own_references),
        # Left a message, but the prompt had no room for it.
        "left_out": sorted(set(sources) - shown)
        if round_.losses.get("did_not_fit") and not round_.own_references
        else [],
        "answers": [[written[group], count] for group, count in answers.most_common()],
        "trajectories": trajectories,
    }


def _all_references(round_: Round) -> Sequence[Reference]:
    if not round_.own_references:
        return round_.references
    all_ = {reference.index: reference for own in round_.own_references for reference in own}
    return [all_[index] for index in sorted(all_)]


def _seen(index: int, round_: Round) -> Sequence[Reference]:
    """By a trajectory of the round, in the order of its labels."""
    if not round_.own_references:
        return round_.references
    place = next((i for i, each in enumerate(round_.trajectories) if each.index == index), 0)
    return round_.own_references[place]


def _cited_sources(each: Mapping[str, Any], round_: Round) -> set[int]:
    seen = _seen(each["index"], round_)
    return {seen[int(number) - 1].index for number in each["citations"]}


def _reference_state(reference: Reference, source: Reference | None) -> str:
    """ "whole"; "shortened" for this prompt; or "tail", the end of a thought that was cut off."""
    if source is not None and source.text != reference.text:
        return "shortened"
    return "tail" if reference.was_cut else "whole"


def _trajectory(
    each: Trajectory,
    round_: Round,
    problem: Problem,
    matching: Matching | None,
    thoughts: bool,
) -> dict[str, Any]:
    seen, rollout = _seen(each.index, round_), each.rollout
    count = len(seen)
    message = next((message for message in round_.messages if message.index == each.index), None)
    thought, text = _split(rollout.content, rollout.reasoning)
    cited: dict[int, list[int]] = {}
    said, thought_of = _parts(text, count), _parts(thought, count)
    for place, parts in enumerate((said, thought_of)):
        for part in parts:
            if not isinstance(part, str):
                cited.setdefault(part[0], [0, 0])[place] += 1
    answer = extract(message.text, matching) if matching and message and not message.was_cut else None
    correct = None
    if answer is not None and message and matching and problem.ground_truth is not None:
        correct = judge(message.text, problem.ground_truth, matching)
    return {
        "index": each.index,
        "state": _state(each, message),
        "message": said,
        # Where it is not what the trajectory says itself.
        "passed_on": message.text if message and message.was_cut else None,
        "thought": thought_of if thoughts else [],
        "tool_calls": [_call(call) for call in rollout.tool_calls],
        "citations": {str(number): cited[number] for number in sorted(cited)},  # [in the message, in the thought]
        "references": [reference.index for reference in seen],  # sources, by label
        "answer": answer[:200] if answer else None,
        "correct": correct,
        "finish_reason": each.finish_reason,
        "error": each.error,
        "seed": rollout.seed,
        "prompt_tokens": rollout.num_prompt_tokens,
        "cached_tokens": rollout.num_cached_tokens,
        "output_tokens": rollout.num_tokens,
        "mean_logprob": rollout.mean_logprob,
        "start": rollout.start,
        "seconds": rollout.seconds,
        "attempts": [dataclasses.asdict(attempt) for attempt in each.attempts],
        # The last try is among the failed ones, if the call was given up.
        "earlier": len(each.attempts) - (each.status in ("error", "timeout") and bool(each.attempts)),
    }


def _state(each: Trajectory, message: Reference | None) -> str:
    """What became of a call: "ok"; "cut", an answer without its end; "tail", the end of a thought; or its loss."""
    if message is not None:
        return "tail" if message.was_cut else "cut" if each.finish_reason == "length" else "ok"
    if each.status != "ok":
        return each.status
    return "truncated" if each.finish_reason == "length" else "empty"


def _split(content: str, reasoning: str | None) -> tuple[str, str]:
    """Thought and message; a server that leaves the thought in the content has it parted here."""
    inside, _, text = content.rpartition(_CLOSE)
    return (reasoning or inside.replace("<think>", "")).strip(), text.strip()


def _parts(text: str, num_references: int) -> list[Any]:
    parts: list[Any] = []
    done = 0
    for start, end, number in find_citations(text, num_references):
        if start > done:
            parts.append(text[done:start])
        parts.append([number, text[start:end]])
        done = end
    return [*parts, text[done:]] if done < len(text) else parts


# The problem: messages, tools, images.


def _conversation_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    items = [] if content is None else content if isinstance(content, list) else [content]
    return {
        "role": str(message.get("role", "")),
        "items": [_item(item) for item in items],
        "tool_calls": [_call(call) for call in message.get("tool_calls") or ()],
    }


def _item(item: Any) -> dict[str, str]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text":
        return {"text": str(item.get("text", ""))}
    if kind == "image":
        return _image(item.get("image"))
    if kind == "image_url":
        url = item.get("image_url")
        return _image(url.get("url") if isinstance(url, Mapping) else url)
    return {"text": item if isinstance(item, str) else _as_text(item)}


def _image(source: Any) -> dict[str, str]:
    """A data URI as it is, a picture from elsewhere made small; what cannot be shown is named."""
    if source is None:
        return {"note": "image, not kept in the results"}
    if isinstance(source, str):
        if source.startswith("data:image/"):
            return {"image": source, "name": "image"}
        if source.startswith(("http://", "https://")):
            return {"note": f"image, not fetched: {source}"}
        source = source.removeprefix("file://")
    name = source if isinstance(source, str) else "image"
    try:
        image = open_image(source, name=name[:200]).copy()
    except ImageError as error:
        return {"note": f"image that cannot be shown: {error}"}
    size = f"{image.width} x {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"image": _data_uri(image), "name": f"{name.rpartition('/')[2]}, {size} pixels"}


def _data_uri(image) -> str:
    # Drawings are smaller as PNG, photographs as JPEG.
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        encoded[kind] = file.getvalue()
    kind = min(encoded, key=lambda each: len(encoded[each]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _call(call: Mapping[str, Any]) -> dict[str, str]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    return {"name": str(function.get("name")), "arguments": "" if arguments is None else _as_text(arguments)}


def _name_of(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name")) if isinstance(function, Mapping) else _as_text(tool)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shown(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has no form for, and with the beginnings alone of the longest
    texts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str) and len(value) > MOST_SHOWN and not value.startswith("data:image/"):
        return f"{value[:MOST_SHOWN]} [... {len(value) - MOST_SHOWN:,} more characters]"
    if isinstance(value, Mapping):
        return {name: shown(each) for name, each in value.items()}
    return [shown(each) for each in value] if isinstance(value, (list, tuple)) else value
