"""The record of a rollout, and the sampler over an engine."""

import json

import pytest

from stepjax.errors import RecordError
from stepjax.rollouts.rollout import Rollout

FULL = Rollout(
    content="7",
    reasoning="3 + 4",
    tool_calls=({"id": "call_5_0", "type": "function", "function": {"name": "add", "arguments": "{}"}},),
    finish_reason="tool_calls",
    stop_reason=151645,
    seed=5,
    mean_logprob=-1 / 3,
    start=0.1,
    seconds=2.5,
    num_prompt_tokens=9,
    num_cached_tokens=8,
    num_tokens=2,
    text="<think>3 + 4</think>7",
    prompt_ids=(1, 2, 3),
    token_ids=(4, 5),
    logprobs=(-0.1, -1e-300),
    sampling_logprobs=(0.0, -0.30000000000000004),
    top_logprobs=(((4, -0.1), (6, -2.5)), ((5, -1e-300),)),
)


@pytest.mark.parametrize("rollout", [Rollout(), FULL, FULL.without_tokens()])
def test_a_rollout_is_read_back_exactly(rollout):
    assert Rollout.from_json(json.loads(json.dumps(rollout.to_json()))) == rollout


def test_only_what_training_needs_is_left_out():
    bare = FULL.without_tokens()
    assert (bare.content, bare.mean_logprob, bare.num_tokens) == (FULL.content, FULL.mean_logprob, FULL.num_tokens)
    assert (bare.text, bare.token_ids, bare.logprobs, bare.prompt_ids) == ("", (), (), ())


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"version": 2}, "version=2"),
        ({"seed": "5"}, "seed='5'"),
        ({"num_tokens": True}, "num_tokens=True"),
        ({"num_tokens": -1}, "num_tokens=-1"),
        ({"content": None}, "content=None"),
        ({"logprobs": [float("nan")]}, "logprobs.0=nan"),
        ({"output_tokens": 3}, "output_tokens=3"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, named):
    with pytest.raises(RecordError, match=named):
        Rollout.from_json({"version": 1, **fields})
