"""HTML pages of outcomes, and an index table, for the viewer in stepjax/web. They need no server.

A page embeds a trace, one JSON object, which rounds.js draws:

    {"title", "id", "sample", "correct", "error", "answered_by", "chosen": [round, index] or null, "seconds", "totals",
     "problem", "has_reasoning",
     "rounds": [{"number", "is_final", "losses", "cut_references", "cut_answers", "totals",
                 "references": [{"index", "text", "state"}],   in the order of their labels; see `_reference_state`
                 "has_own_references",                         each trajectory sees some of them, with its own labels
                 "left_out": [index, ...],                     their messages did not fit the prompt
                 "answers": [[answer, count], ...],
                 "trajectories": [{"round", "index", "state",  see `_state`
                                   "message", "reasoning",     lists of parts: text, or [label, text] for a citation
                                   "passed_on",                replaces the message if that was cut
                                   "references": [index, ...] or null,
                                   "citations": {label: [count, count in the reasoning]}, ...}]}]}
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax import web
from stepjax.errors import ImageError
from stepjax.pacore.answers import Matching, extract, grouped, judge
from stepjax.pacore.compaction import find_citations
from stepjax.pacore.journal import replacing
from stepjax.pacore.records import Outcome, Problem, Reference, Round, Trajectory
from stepjax.processing.image_files import open_image

MOST_SHOWN = 1_000_000  # characters of one text
_THUMBNAIL = 512  # pixels, the longer side


def write_trace(of: Outcome, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes `trace_html(of, **options)`.

    Raises:
        CheckpointError: it cannot be written.
    """
    _write(Path(path), trace_html(of, **options))


def trace_html(
    of: Outcome, *, title: str | None = None, matching: Matching | None = None, reasoning: bool = True
) -> str:
    """The page of an outcome.

    Args:
        matching: how to find the short answers in messages; None if the problem has no short answer.
        reasoning: include the reasoning; it makes up most of a page.
    """
    title = title or title_of(of)
    return web.saved_page(title, _bounded({"title": title, **trace_data(of, matching=matching, reasoning=reasoning)}))


def title_of(of: Outcome) -> str:
    return f"{of.problem.id}, sample {of.sample}" if of.sample else of.problem.id


def page_name(problem: str, sample: int) -> str:
    """A file name unique to the problem, even on case-insensitive file systems."""
    plain = re.sub(r"[^a-z0-9._-]", "_", problem.lower()).lstrip("._-")[:60] or "problem"
    if plain != problem or plain == "index" or ".sample-" in plain:
        plain = f"{plain}-{hashlib.blake2b(problem.encode('utf-8', 'surrogatepass'), digest_size=5).hexdigest()}"
    return f"{plain}.html" if not sample else f"{plain}.sample-{sample}.html"


def trace_data(of: Outcome, *, matching: Matching | None = None, reasoning: bool = True) -> dict[str, Any]:
    """The trace of an outcome. For its form see the top of this file, for the arguments `trace_html`."""
    ends = [each.rollout.start + each.rollout.seconds for round_ in of.rounds for each in round_.trajectories]
    return {
        "id": of.problem.id,
        "sample": of.sample,
        "correct": of.correct,
        "error": of.error,
        "answered_by": of.answered_by,
        "chosen": of.chosen,
        "seconds": of.seconds or max(ends, default=0.0),
        "totals": dataclasses.asdict(of.totals),
        "problem": _problem(of.problem),
        "has_reasoning": reasoning,
        "rounds": [_round(of, number, matching, reasoning) for number in range(len(of.rounds))],
    }


def _round(of: Outcome, number: int, matching: Matching | None, reasoning: bool) -> dict[str, Any]:
    round_ = of.rounds[number]
    sources = {each.index: each for each in (of.rounds[number - 1].messages if number else of.problem.given)}
    seen = round_.own_references or (round_.references,) * round_.width
    # If each trajectory has its own references, list all of them, by index.
    every = {each.index: each for own in round_.own_references for each in own}
    references = [every[index] for index in sorted(every)] or round_.references
    trajectories = [
        _trajectory(each, round_, own, of.problem.ground_truth, matching, reasoning)
        for each, own in zip(round_.trajectories, seen, strict=True)
    ]
    written = [each["answer"] or "" for each in trajectories]
    groups = Counter(group for group in (grouped(written, matching) if matching else ()) if group is not None)
    has_left_out = round_.losses.get("did_not_fit") and not round_.own_references
    return {
        "number": number,
        "is_final": round_.is_final,
        "losses": dict(round_.losses),
        "cut_references": round_.cut_references,
        "cut_answers": round_.cut_answers,
        "totals": dataclasses.asdict(round_.totals),
        "references": [
            {"index": each.index, "text": each.text, "state": _reference_state(each, sources.get(each.index))}
            for each in references
        ],
        "has_own_references": bool(round_.own_references),
        "left_out": sorted(sources.keys() - {each.index for each in references}) if has_left_out else [],
        "answers": [[written[group], count] for group, count in groups.most_common()],
        "trajectories": trajectories,
    }


def _reference_state(reference: Reference, source: Reference | None) -> str:
    """ "whole"; "shortened" for this prompt; or "tail", the end of a cut-off reasoning."""
    if source is not None and source.text != reference.text:
        return "shortened"
    return "tail" if reference.was_cut else "whole"


def _trajectory(
    each: Trajectory, round_: Round, seen: Sequence[Reference], truth: Any, matching: Matching | None, reasoning: bool
) -> dict[str, Any]:
    rollout = each.rollout
    message = next((message for message in round_.messages if message.index == each.index), None)
    inside, _, text = rollout.content.rpartition("</think>")  # a server may leave the reasoning in the content
    said = _parts(text.strip(), len(seen))
    reasoned = _parts((rollout.reasoning or inside.replace("<think>", "")).strip(), len(seen))
    times, in_reasoning = (
        Counter(part[0] for part in parts if not isinstance(part, str)) for parts in (said + reasoned, reasoned)
    )
    answer = correct = None
    if matching and message and not message.was_cut:
        answer = extract(message.text, matching)
        correct = None if truth is None else judge(message.text, truth, matching)
    return {
        "round": round_.number,
        "index": each.index,
        "state": _state(each, message),
        "message": said,
        "passed_on": message.text if message and message.was_cut else None,
        "reasoning": reasoned if reasoning else [],
        "tool_calls": [_call(call) for call in rollout.tool_calls],
        "citations": {str(label): [times[label], in_reasoning[label]] for label in sorted(times)},
        "references": [reference.index for reference in seen] if round_.own_references else None,
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
    }


def _state(each: Trajectory, message: Reference | None) -> str:
    """The state of a call: "ok"; "cut", an answer without its end; "tail", the end of its reasoning; or its loss."""
    is_cut = each.finish_reason == "length"
    if message is not None:
        return "tail" if message.was_cut else "cut" if is_cut else "ok"
    return each.status if each.status != "ok" else "truncated" if is_cut else "empty"


def _parts(text: str, num_references: int) -> list[Any]:
    parts: list[Any] = []
    done = 0
    for start, end, label in find_citations(text, num_references):
        parts += [text[done:start]] if start > done else []
        parts.append([label, text[start:end]])
        done = end
    return [*parts, text[done:]] if done < len(text) else parts


# The problem: messages, tools, images.


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "messages": [
            {
                "role": str(message.get("role", "")),
                "items": [_item(item) for item in _items(message.get("content"))],
                "tool_calls": [_call(call) for call in message.get("tool_calls") or ()],
            }
            for message in problem.messages
        ],
        "tools": [_call(tool)["name"] for tool in problem.tools],
        "ground_truth": None if problem.ground_truth is None else _as_text(problem.ground_truth),
        "extra": {str(name): _as_text(value) for name, value in problem.extra.items()},
    }


def _items(content: Any) -> list[Any]:
    return [] if content is None else content if isinstance(content, list) else [content]


def _item(item: Any) -> dict[str, str]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text":
        return {"text": str(item.get("text", ""))}
    if kind == "image":
        return _image(item.get("image"))
    if kind == "image_url":
        url = item.get("image_url")
        return _image(url.get("url") if isinstance(url, Mapping) else url)
    return {"text": _as_text(item)}


def _image(source: Any) -> dict[str, str]:
    """Data URIs pass through, other images become thumbnails; a note replaces one that cannot be shown."""
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
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "webp", quality=85)
    uri = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"image": uri, "name": f"{name.rpartition('/')[2]}, {size} pixels"}


def _call(call: Mapping[str, Any]) -> dict[str, str]:
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return {"name": _as_text(call), "arguments": ""}
    arguments = function.get("arguments")
    return {"name": str(function.get("name")), "arguments": "" if arguments is None else _as_text(arguments)}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# The table of a run.


def table_entry(of: Outcome, page: str, matching: Matching) -> dict[str, Any]:
    """An outcome's row of the table; small for any outcome."""
    truth = of.problem.ground_truth
    answer = of.error or (of.content if truth is None else extract(of.content, matching))
    return {
        "page": page,
        "name": title_of(of),
        "error": of.error is not None,
        "correct": of.correct,
        "answer": _line(answer),
        "truth": "" if truth is None else _line(str(truth)),
        "answered_by": of.answered_by,
        "seconds": of.seconds,
        **{name: getattr(of.totals, name) for name in ("calls", "output_tokens", "lost_tokens")},
    }


def write_table(entries: Sequence[Mapping[str, Any]], path: Path, *, title: str, method: str | None) -> None:
    """Writes a page with a row for each entry, and their sums."""
    scored = [each["correct"] for each in entries if each["correct"] is not None]
    total = {name: sum(each[name] for each in entries) for name in ("error", "calls", "output_tokens", "lost_tokens")}
    facts = [
        ["method", method],
        ["answers", len(entries)],
        ["right", f"{sum(scored)} of {len(scored)}" if scored else None],
        ["failed", total["error"] or None],
        ["calls", f"{total['calls']:,}"],
        ["output tokens (TTC)", f"{total['output_tokens']:,}"],
        ["lost tokens", f"{total['lost_tokens']:,}"],
    ]
    _write(path, web.saved_page(title, _bounded({"title": title, "facts": facts, "answers": entries})))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


def _bounded(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, by None, and truncates very long texts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str) and len(value) > MOST_SHOWN and not value.startswith("data:image/"):
        return f"{value[:MOST_SHOWN]} [... {len(value) - MOST_SHOWN:,} more characters]"
    if isinstance(value, Mapping):
        return {name: _bounded(each) for name, each in value.items()}
    return [_bounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a title may have a lone surrogate
