"""Problems from a file: questions to ask, released training data, or the results of an earlier run."""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepjax.errors import RecordError
from stepjax.pacore.records import Problem
from stepjax.pacore.template import check_conversation

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CONVERSATIONS = ("messages", "conversation", "problem")
_KNOWN = {*_CONVERSATIONS, "id", "ground_truth", "responses", "tools"}

# What a batch run writes beside these: a file of results can be read again, and its answers are not carried along.
RESULT_FIELDS = (
    *("sample", "final_response", "final_reasoning_content", "final_tool_calls", "answered_by", "chosen", "correct"),
    *("unjudged", "round_responses", "references", "usage", "losses", "cut_references", "cut_answers"),
    *("error", "extra"),
)


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """
    Attributes:
        digest: of what the model is asked, as the file has it: another one makes another run. Answers, and the bytes of
            images in files of their own, are not in it.
        notes: what a user may want to know about the file.
    """

    problems: tuple[Problem, ...]
    digest: str
    notes: tuple[str, ...] = ()


def read_problems(path: str | Path, *, use_responses: bool = False, limit: int | None = None) -> ProblemSet:
    """Reads a .jsonl file, or a .json file with a list.

    A record has `messages` or `conversation` (chat messages), or `problem` (a text, for one user message). It may have
    `id` (by default req_0, req_1 and so on), `ground_truth`, `tools` and `responses`. All else is passed through.

    Args:
        use_responses: the first round sees the messages in `responses`.
        limit: how many problems are taken, from the beginning.

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
            raise RecordError(f"{where}: id {name!r} is that of {seen[name]} too; ids must differ")
        seen[name] = where.removeprefix(f"{path}, ")
        responses, empty = _responses(record, where) if use_responses else ((), 0)
        num_unused += bool(record.get("responses")) and not use_responses
        num_empty += empty
        asked = _conversation(record, where)
        problem = Problem(
            id=name,
            messages=tuple(_located(message, path.parent, where) for message in asked),
            tools=_tools(record, where),
            ground_truth=record.get("ground_truth"),
            responses=responses,
            extra=_extra(record),
        )
        try:
            check_conversation(problem.messages)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from error
        problems.append(problem)
        digest.update(json.dumps([name, asked, problem.tools, responses], sort_keys=True).encode() + b"\n")
    if not problems:
        raise RecordError(f"{path} has no problems" if limit != 0 else "limit=0 leaves no problems")
    if use_responses and not any(problem.responses for problem in problems):
        raise RecordError(f"{path}: no problem has responses; leave --use-responses out")
    notes = []
    if num_unused:
        notes.append(f"{num_unused} problems have responses; they are used with --use-responses alone")
    if num_empty:
        notes.append(f"{num_empty} of the responses say nothing after their thought, and are left out")
    return ProblemSet(tuple(problems), digest.hexdigest(), tuple(notes))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a record stands, and the record."""
    if path.suffix not in (".json", ".jsonl"):
        raise RecordError(f"problems {str(path)!r}: give a .jsonl file, or a .json file with a list")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"problems {str(path)!r} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        # Not splitlines: what JSON may hold unescaped, such as U+2028, is no end of a line.
        lines = enumerate(text.split("\n"), start=1)
        parsed = (
            (f"{path}, line {number}", _parsed(line, f"{path}, line {number}"))
            for number, line in lines
            if line.strip()
        )
    else:
        whole = _parsed(text, str(path))
        if not isinstance(whole, list):
            raise RecordError(f"{path}: must hold a list of problems, not {_short(whole)}")
        parsed = ((f"{path}, problem {number}", each) for number, each in enumerate(whole, start=1))
    for where, record in parsed:
        if not isinstance(record, dict):
            raise RecordError(f"{where}: {_short(record)} is no problem; give an object with messages")
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


def _responses(record: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    """The messages, without thoughts; and how many had nothing else."""
    given = record.get("responses") or []
    if not isinstance(given, list):
        raise RecordError(f"{where}: responses is {_short(given)}; give a list")
    messages = []
    for place, each in enumerate(given):
        text = each.get("content") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise RecordError(f'{where}: responses[{place}] is {_short(each)}; give a text, or {{"content": text}}')
        messages.append(text.rpartition("</think>")[2].strip())
    return tuple(message for message in messages if message), messages.count("")


def _extra(record: Mapping[str, Any]) -> dict[str, Any]:
    earlier = record.get("extra")
    rest = {name: value for name, value in record.items() if name not in _KNOWN and name not in RESULT_FIELDS}
    return {**(earlier if isinstance(earlier, dict) else {}), **rest}


def _located(message: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The message with paths of images that hold wherever the process runs."""
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
        raise RecordError(f"{where}: the image {_short(source)} is none; give a path or a data URI")
    if source.startswith("data:"):
        return item
    frame = {"frame": item["frame"]} if "frame" in item else {}
    if source.startswith(("http://", "https://")):
        return {"type": "image_url", "image_url": {"url": source}, **frame}
    name = urllib.parse.unquote(source.removeprefix("file://")) if source.startswith("file://") else source
    file = (folder / Path(name).expanduser()).resolve()
    if not file.is_file():
        raise RecordError(f"{where}: there is no image file {str(file)!r}; paths are relative to the problems' folder")
    return {"type": "image", "image": str(file), **frame}


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
