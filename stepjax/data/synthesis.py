"""Synthesis prompts: a problem, and some of the messages that were drawn for it (PaCoRe, section 2.2).

A cache is a JSON Lines file of ordinary records, each with its `responses`: rollouts with their `reward`, as `stepjax
pacore cache` writes them, or texts. A prompt shows the conclusions of a random subset in random order.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepjax.config import SynthesisSource
from stepjax.errors import RecordError
from stepjax.processing.synthesis import Template

DRAWS = 1000  # prompts from one problem; a run that reads more sees draws again


def messages_of(record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The conclusions of a record's responses, without those that have none, and their rewards.

    Raises:
        RecordError: the responses are not rollouts or texts.
    """
    responses = record.get("responses")
    if not isinstance(responses, list):
        raise RecordError(f"record {record['id']!r} has no responses: draw them with `stepjax pacore cache`")
    found = []
    for place, each in enumerate(responses):
        text, reward = each, None
        if isinstance(each, dict):
            nothing = "" if "version" in each else None  # a rollout that was cut off within its reasoning
            text, reward = each.get("content", nothing), each.get("reward")
        if not isinstance(text, str) or not isinstance(reward, (int, float, type(None))):
            raise RecordError(
                f"record {record['id']!r}: responses[{place}] is {each!r:.100}; give a text, or a rollout with content "
                "and reward"
            )
        conclusion = text.rpartition("</think>")[2].strip()
        if conclusion:
            found.append((conclusion, reward))
    return found


class SynthesisRecords:
    """Random access to the synthesis prompts of a cache: record i depends only on (seed, source, i).

    Besides the fields of the problem's record, a record has `reference_rewards`, those of the messages in the prompt,
    and `cached`, the problem's record.
    """

    def __init__(self, source: SynthesisSource, seed: int, problems: Any):
        self._source, self._seed, self._problems = source, seed, problems
        self._template = Template(source.template, source.images)
        self._key = int.from_bytes(hashlib.blake2b(source.name.encode(), digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return len(self._problems) * DRAWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, problem = divmod(int(index), len(self._problems))
        record = self._problems[problem]
        fewest, most = self._source.references
        messages = messages_of(record)
        if len(messages) < fewest:
            raise RecordError(
                f"record {record['id']!r} has {len(messages)} usable responses, fewer than "
                f"data.sources.{self._source.name}.references={self._source.references} asks for"
            )
        rng = np.random.default_rng((self._seed, self._key, index))
        count = int(rng.integers(fewest, min(most, len(messages)) + 1))
        drawn = [messages[i] for i in rng.permutation(len(messages))[:count]]
        asked = record.get("messages") or []
        if asked and asked[-1].get("role") == "assistant":
            asked = asked[:-1]
        shown = self._template.conversation(asked, [text for text, _ in drawn])
        fields = {name: value for name, value in record.items() if name != "responses"}
        own = {"id": f"{record['id']}#{draw}", "messages": list(shown), "cached": record}
        return {**fields, **own, "reference_rewards": [reward for _, reward in drawn]}

    def files(self) -> list[dict[str, Any]]:
        return self._problems.files()
