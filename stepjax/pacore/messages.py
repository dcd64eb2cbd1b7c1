"""Compaction: from a trajectory to the message that it leaves, and from a round's messages to references (section 2.1).

C(w) keeps the conclusion and drops the chain of thought: what stands after the last `</think>`. A trajectory that was
cut off within its thought has no conclusion. It is dropped, or the end of the thought is passed on; never the whole.
"""

import json
import random
from collections.abc import Iterable, Sequence

from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import Message, Trajectory
from stepjax.pacore.template import CUT_MARK
from stepjax.rollouts.sampler import TokenCounter

_CLOSE = "</think>"


def compact(trajectory: Trajectory, config: PacoreConfig, tokens: TokenCounter | None) -> Message | str:
    """The message of a trajectory, or the reason why it leaves none: its status, "empty" or "truncated".

    Args:
        tokens: needed where `config.truncated` is "tail".
    """
    if trajectory.status != "ok":
        return trajectory.status
    _, _, conclusion = trajectory.content.rpartition(_CLOSE)
    calls = [_call_text(call) for call in trajectory.tool_calls]
    text = "\n".join(part for part in (conclusion.strip(), *calls) if part)
    if text:
        return Message(trajectory.index, text)
    if trajectory.finish_reason != "length":
        return "empty"
    thought = (trajectory.reasoning or "").strip()
    if config.truncated == "drop" or not thought:
        return "truncated"
    assert tokens is not None, "checked when the coordinator was made"
    return Message(trajectory.index, CUT_MARK + tokens.tail(thought, config.tail_tokens).lstrip(), was_cut=True)


def answers(messages: Iterable[Message]) -> list[Message]:
    """Those that may be voted on: without ends of thoughts, as long as there are others."""
    messages = list(messages)
    return [message for message in messages if not message.was_cut] or messages


def _call_text(call: dict) -> str:
    """A proposed call as markup: tool_call, function and parameter, as the authors' server writes it."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    lines = ["<tool_call>", f"<function={function.get('name')}>"]
    for name, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"<parameter={name}>\n{shown}\n</parameter>")
    return "\n".join([*lines, "</function>", "</tool_call>"])


def ordered(
    messages: Iterable[Message], trajectories: Sequence[Trajectory], config: PacoreConfig, seed: int
) -> list[Message]:
    """References in the order in which the next prompt lists them; it does not depend on who ended first.

    Args:
        messages: of `trajectories`, found there by their index.
        seed: for the shuffle; `config.order` "length" has 42 of its own, in every round.
    """
    references = sorted(messages, key=lambda message: message.index)
    if config.order == "shuffle":
        random.Random(seed).shuffle(references)
        return references
    # The released code compares the lengths of what its server calls content: all that was written, or, if the server
    # takes thoughts out, the rest. Here thoughts are always out.
    lengths = {each.index: len(each.content) for each in trajectories}
    references.sort(key=lambda message: lengths.get(message.index, len(message.text)))
    random.Random(42).shuffle(references)
    return references
