"""A row of results.jsonl, and the file that rows wait in until all are there.

Rows have the names of the released batch code's output and of the released training data, so that results can be the
problems of another run. Nothing in them depends on time, on the order in which calls ended, or on caches; but for
an answer that takes so long to compare that it is not judged.
"""

import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.pacore.answers import Matching, judge
from stepjax.pacore.journal import replace_file
from stepjax.pacore.records import Message, Outcome, Problem, Round, Totals, Trajectory
from stepjax.pacore.template import CUT_MARK


def row(
    problem: Problem,
    sample: int,
    rounds: Sequence[Round],
    outcome: Outcome | None,
    error: str | None,
    matching: Matching,
) -> dict[str, Any]:
    """
    Args:
        rounds: that ended, of a problem that failed too.
        outcome: None where it failed; `error` then says why.
    """
    known = problem.ground_truth is not None
    # A problem that failed is wrong; None: not known, or it cannot be told.
    right = judge(outcome.content if outcome else "", problem.ground_truth, matching) if known else None
    return {
        "id": problem.id,
        "conversation": [_without_bytes(message) for message in problem.messages],
        **({"tools": list(problem.tools)} if problem.tools else {}),
        "ground_truth": problem.ground_truth,
        "responses": [message.text for message in rounds[0].messages] if rounds else [],
        "sample": sample,
        "final_response": outcome.content if outcome else None,
        "final_reasoning_content": outcome.reasoning if outcome else None,
        **({"final_tool_calls": list(outcome.tool_calls)} if outcome and outcome.tool_calls else {}),
        "answered_by": outcome.answered_by if outcome else None,
        "chosen": list(outcome.chosen) if outcome else None,
        "correct": right,
        **({"unjudged": True} if known and right is None else {}),
        "round_responses": [[_response(each) for each in round_.trajectories] for round_ in rounds],
        "references": [_references(problem, rounds, number) for number in range(len(rounds))],
        "usage": _usage(rounds),
        "losses": [dict(sorted(round_.losses.items())) for round_ in rounds],
        "cut_references": [round_.cut_references for round_ in rounds],
        "cut_answers": [round_.cut_answers for round_ in rounds],
        "error": error,
        **({"extra": dict(problem.extra)} if problem.extra else {}),
    }


def _references(problem: Problem, rounds: Sequence[Round], number: int) -> list[list[list[int | None]]]:
    """What a round's prompts listed: one list for all, or one for each trajectory. It has the index of each message
    and, where that was shortened for this prompt, how many characters of its end are left.
    """
    given = [Message(i, text) for i, text in enumerate(problem.responses)]
    texts = rounds[number - 1].messages if number else given
    whole = {message.index: message.text for message in texts}
    each = rounds[number].own_references or (rounds[number].references,)
    return [
        [
            [message.index, None if whole.get(message.index) == message.text else len(message.text) - len(CUT_MARK)]
            for message in references
        ]
        for references in each
    ]


def _response(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "content": trajectory.content,
        "reasoning_content": trajectory.reasoning,
        **({"tool_calls": list(trajectory.tool_calls)} if trajectory.tool_calls else {}),
        "finish_reason": trajectory.finish_reason,
        "status": trajectory.status,
        "error": trajectory.error,
        "seed": trajectory.seed,
        "prompt_tokens": trajectory.prompt_tokens,
        "output_tokens": trajectory.output_tokens,
        "lost_tokens": trajectory.lost_tokens,
        "failed_tries": len(trajectory.attempts),
        "mean_logprob": trajectory.mean_logprob,
    }


def _usage(rounds: Sequence[Round]) -> dict[str, Any]:
    totals = Totals.of(each for round_ in rounds for each in round_.trajectories)
    return {
        "calls": totals.calls,
        "failed_tries": totals.retries,
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.output_tokens,
        "lost_tokens": totals.lost_tokens,
        "finish_reasons": dict(sorted(Counter(totals.finish_reasons).items())),
    }


def _without_bytes(message: Mapping[str, Any]) -> dict[str, Any]:
    """Images that are neither paths nor URIs are left out: null stands in their place."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    items = [
        {**item, "image": None} if "image" in item and not isinstance(item["image"], str) else item for item in content
    ]
    return {**message, "content": items}


def to_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which models write now and then
        return json.dumps(row).encode() + b"\n"


class Rows:
    """Rows that come in any order, on disk: there may be many more of them than fit into memory."""

    def __init__(self, directory: Path):
        self._file = tempfile.TemporaryFile(dir=directory, prefix="rows.")
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._end = self._saved = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def add(self, key: tuple[int, int], line: bytes) -> None:
        """
        Args:
            key: the problem's place and the sample: what rows are ordered by.
        """
        self._file.write(line)
        self._file.flush()
        self._places[key] = (self._end, len(line))
        self._end += len(line)

    def save(self, path: Path) -> None:
        """Replaces a file by the rows so far, in order. A thread may do so while rows are added; one that comes late,
        when more have been saved, does nothing."""
        places = dict(self._places)
        with self._lock:
            if not self._file.closed and len(places) >= self._saved:
                replace_file(path, self._lines(places))
                self._saved = len(places)

    def _lines(self, places: Mapping[tuple[int, int], tuple[int, int]]) -> Iterator[bytes]:
        for _, (offset, length) in sorted(places.items()):
            yield os.pread(self._file.fileno(), length, offset)
