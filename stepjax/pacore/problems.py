"""Reads problems from a file: questions, the released training data, or the results of an earlier run."""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, RecordError
from stepjax.pacore.records import Problem
from stepjax.processing.synthesis import check_conversation

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CONVERSATIONS = ("messages", "conversation", "problem")
_KNOWN = {*_CONVERSATIONS, "id", "ground_truth", "responses", "tools"}

# Fields that a batch run adds. They are dropped when a results file is read as problems.
_RESULT_FIELDS = {
    *("sample", "final_response", "final_reasoning_content", "final_tool_calls", "answered_by", "chosen", "correct"),
    *("unjudged", "round_responses", "references", "usage", "losses", "cut_references", "cut_answers"),
    *("error", "extra"),
}


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """
    Attributes:
        digest: of the prompts as in the file; a different one means a different run. Excludes ground truths and the
            bytes of separate image files.
        notes: remarks about the file for the user.
    """

    problems: tuple[Problem, ...]
    digest: str
    notes: tuple[str, ...] = ()


def read_problems(path: str | Path, *, use_responses: bool = False, limit: int | None = None) -> ProblemSet:
    """Reads a .jsonl file, or a .json file with a list.

    A record has `messages` or `conversation` (chat messages), or `problem` (the text of one user message). It may have
    `id` (default: req_0, req_1 and so on), `ground_truth`, `tools` and `responses`. Other fields pass through.

    Args:
        use_responses: show the messages in `responses` to the first round.
        limit: use only the first problems.

    Raises:
        RecordError: the file or a record cannot be used; names the file and the line.
    """
    path = Path(path).expanduser()
    digest, problems, seen = hashlib.sha256(), [], {}
    num_unused = num_empty = 0
    for index, (where, record) in enumerate(_records(path)):
        if index == limit:
            break
        name = str(record.get("id", f"req_{index}"))
        if name in seen:
            raise RecordError(f"{where}: id {name!r} is already used in {seen[name]}; make ids unique")
        seen[name] = where.removeprefix(f"{path}, ")
        responses = _responses(record, where) if use_responses else []
        num_unused += bool(record.get("responses")) and not use_responses
        num_empty += responses.count("")
        asked, earlier = _conversation(record, where), record.get("extra")
        try:
            check_conversation(asked)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from error
        rest = {name: value for name, value in record.items() if name not in _KNOWN | _RESULT_FIELDS}
        problem = Problem(
            id=name,
            messages=tuple(_located(message, path.parent, where) for message in asked),
            tools=_tools(record, where),
            ground_truth=record.get("ground_truth"),
            responses=tuple(filter(None, responses)),
            extra={**(earlier if isinstance(earlier, dict) else {}), **rest},
        )
        problems.append(problem)
        digest.update(json.dumps([name, asked, problem.tools, problem.responses], sort_keys=True).encode() + b"\n")
    if not problems:
        raise RecordError(f"{path} has no problems" if limit != 0 else "limit=0 leaves no problems")
    if use_responses and not any(problem.responses for problem in problems):
        raise RecordError(f"{path}: no problem has responses; leave --use-responses out")
    notes = []
    if num_unused:
        notes.append(f"{num_unused} problems have responses, which are ignored without --use-responses")
    if num_empty:
        notes.append(f"{num_empty} of the responses have only reasoning, and are ignored")
    return ProblemSet(tuple(problems), digest.hexdigest(), tuple(notes))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each record and its location in the file."""
    if path.suffix not in (".json", ".jsonl"):
        raise RecordError(f"problems {str(path)!r}: give a .jsonl file, or a .json file with a list")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"problems {str(path)!r} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        # Not splitlines: it also splits at characters that JSON allows unescaped, such as U+2028.
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        parsed = ((where, _parsed(line, where)) for where, line in lines)
    else:
        whole = _parsed(text, str(path))
        if not isinstance(whole, list):
            raise RecordError(f"{path}: must hold a list of problems, not {_short(whole)}")
        parsed = ((f"{path}, problem {i}", each) for i, each in enumerate(whole, start=1))
    for where, record in parsed:
        if not isinstance(record, dict):
            raise RecordError(f"{where}: {_short(record)} is not a problem; give an object with messages")
        yield where, record


def _parsed(text: str, where: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON ({error})") from error


def _conversation(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    given = [name for name in _CONVERSATIONS if record.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or f"only {', '.join(map(str, record)) or 'nothing'}"
        raise RecordError(f"{where} has {found}: give one of messages, conversation and problem")
    value = record[given[0]]
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RecordError(f"{where}: {given[0]} is {_short(value)}; give a list of messages, or a text")
    for place, message in enumerate(value):
        at = f"{where}: {given[0]}[{place}]"
        if not isinstance(message, dict):
            raise RecordError(f"{at} is {_short(message)}; give an object with role and content")
        if message.get("role") not in _ROLES:
            raise RecordError(f"{at} has role={_short(message.get('role'))}: must be one of {', '.join(_ROLES)}")
        content = message.get("content")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise RecordError(f"{at} has content={_short(content)}: give a text, or a list of text and images")
    return value


def _tools(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"{where}: tools is {_short(tools)}; give a list of objects, as in OpenAI's API")
    return tuple(tools)


def _responses(record: Mapping[str, Any], where: str) -> list[str]:
    """The responses without their reasoning; some may then be empty."""
    given = record.get("responses") or []
    if not isinstance(given, list):
        raise RecordError(f"{where}: responses is {_short(given)}; give a list")
    texts = []
    for place, each in enumerate(given):
        text = each.get("content") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise RecordError(f'{where}: responses[{place}] is {_short(each)}; give a text, or {{"content": text}}')
        texts.append(text.rpartition("</think>")[2].strip())
    return texts


def _located(message: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The message with absolute paths of images."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_item(item, folder, where) for item in content]}


def _item(item: Any, folder: Path, where: str) -> Any:
    if not isinstance(item, dict) or item.get("type") not in ("image", "image_url"):
        return item
    source = item.get(item["type"])
    source = source.get("url") if isinstance(source, dict) else source
    if not isinstance(source, str) or not source:
        raise RecordError(f"{where}: {_short(source)} is not an image; give a path or a data URI")
    if source.startswith("data:"):
        return item
    frame = {"frame": item["frame"]} if "frame" in item else {}
    if source.startswith(("http://", "https://")):
        return {"type": "image_url", "image_url": {"url": source}, **frame}
    name = urllib.parse.unquote(source.removeprefix("file://")) if source.startswith("file://") else source
    file = (folder / Path(name).expanduser()).resolve()
    if not file.is_file():
        raise RecordError(f"{where}: image file {str(file)!r} does not exist; paths are relative to the problem file")
    return {"type": "image", "image": str(file), **frame}


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# The run's own copy.


def problem_line(problem: Problem) -> bytes:
    return json_line({**vars(problem), "messages": [without_bytes(message) for message in problem.messages]})


def saved_problems(path: Path) -> Iterator[Problem]:
    """
    Raises:
        CheckpointError: the file cannot be read, or has another format.
    """
    try:
        with open(path, "rb") as file:
            for fields in map(json.loads, file):
                lists = {name: tuple(fields[name]) for name in ("messages", "tools", "responses")}
                yield Problem(**{**fields, **lists})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; rerun the run's command to rewrite it") from error


def json_line(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which models write now and then
        return json.dumps(value).encode() + b"\n"


def without_bytes(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message for JSON: image bytes become null."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    items = [
        {**item, "image": None} if "image" in item and not isinstance(item["image"], str) else item for item in content
    ]
    return {**message, "content": items}
