"""What fails for one sample ends that sample alone: the others' tokens, the pages and the groups are as without it."""

import dataclasses

import numpy as np
import pytest

from stepjax.errors import RequestError
from stepjax.inference.output import TextStream, advance
from stepjax.inference.request import SamplingParams
from stepjax.inference.sequence import Sequence

TEXT = [3, 1, 4, 1, 5, 9, 2, 6] * 5 + [5, 3, 5, 8]  # a third page is filled while decoding
PARAMS = SamplingParams(seed=5, max_tokens=8, logprobs=2)


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


def run(engine, requests):
    """Tokens of each sample, by request and number; None of those that failed. All are submitted before the first."""
    for request_id, prompt, params in requests:
        engine.submit(prompt, params, request_id=request_id)
    tokens, failed = {}, {}
    while engine.has_work:
        for delta in engine.step():
            at = delta.request_id, delta.sample
            tokens[at] = (*tokens.get(at, ()), *delta.tokens)
            if delta.finish_reason == "error":
                failed[at] = delta.stop_reason
    scheduler = engine._scheduler
    assert not (scheduler.running or scheduler.waiting or scheduler.num_following or scheduler._leaders)
    assert engine.stats().pages_used == 0
    return {at: None if at in failed else each for at, each in tokens.items()} | dict.fromkeys(failed), failed


def fails(method, request_id, sample, *, after=0):
    """In place of a method of Sequence: fails for one sample once it has drawn `after` tokens."""

    def failing(self, *args):
        if (self.prompt.request_id, self.sample) == (request_id, sample) and len(self.generated) >= after:
            raise OverflowError("Python integer 2147483648 out of bounds for int32")
        return method(self, *args)

    return failing


class FailingText(TextStream):
    def add(self, token):
        if len(self._tokens) == 2:
            raise KeyError(token)
        return super().add(token)


def break_text(monkeypatch, at):
    class Broken(Sequence):
        def __init__(self, prompt, sample, decode):
            super().__init__(prompt, sample, decode)
            if (prompt.request_id, sample) == at:
                self.text = FailingText(decode, ())

    monkeypatch.setattr("stepjax.inference.engine.Sequence", Broken)


def break_row(monkeypatch, at):
    monkeypatch.setattr(Sequence, "last_token", property(fails(Sequence.last_token.fget, *at, after=1)))


def break_logprobs(monkeypatch, at):
    def failing(sequence, drawn, row, stop_ids):
        if (sequence.prompt.request_id, sequence.sample) == at and len(sequence.generated) == 3:
            raise IndexError(row)
        return advance(sequence, drawn, row, stop_ids)

    monkeypatch.setattr("stepjax.inference.engine.advance", failing)


BREAKS = {
    "admission": lambda patch, at: patch.setattr(Sequence, "extend_keys", fails(Sequence.extend_keys, *at)),
    "prefill": lambda patch, at: patch.setattr(Sequence, "tokens", fails(Sequence.tokens, *at)),
    "features": lambda patch, at: patch.setattr(Sequence, "feature_rows", fails(Sequence.feature_rows, *at)),
    "row": break_row,
    "text": break_text,
    "logprobs": break_logprobs,
    "keys": lambda patch, at: patch.setattr(Sequence, "extend_keys", fails(Sequence.extend_keys, *at, after=4)),
}


@pytest.mark.parametrize("shared", [True, False], ids=["same prompt", "other prompt"])
@pytest.mark.parametrize("where", BREAKS)
def test_one_sample_fails_alone(engine, prompts, monkeypatch, where, shared):
    others = [("other", TEXT, PARAMS), ("four", TEXT, dataclasses.replace(PARAMS, seed=7, n=3))]
    others.append(("image", prompts[0], PARAMS))
    engine.update_weights(engine.model)  # forget the pages of the test before: the prompts are computed
    expected, failed = run(engine, others)
    assert not failed and all(expected.values())
    engine.update_weights(engine.model)
    victim = ("victim", TEXT if shared else TEXT[1:], dataclasses.replace(PARAMS, seed=9))
    BREAKS[where](monkeypatch, ("victim", 0))
    got, failed = run(engine, [victim, *others])  # where prompts are the same, the others follow the victim
    assert list(failed) == [("victim", 0)] and "Error: " in failed["victim", 0]
    assert got == {**expected, ("victim", 0): None}


@pytest.mark.parametrize("sample", [0, 2])
@pytest.mark.parametrize("where", ["prefill", "row", "text"])
def test_samples_of_one_request_fail_one_by_one(engine, monkeypatch, where, sample):
    requests = [("four", TEXT, dataclasses.replace(PARAMS, n=4))]
    engine.update_weights(engine.model)
    expected, _ = run(engine, requests)
    engine.update_weights(engine.model)
    BREAKS[where](monkeypatch, ("four", sample))
    got, failed = run(engine, requests)
    if where == "prefill" and sample:  # its prompt is computed by another
        assert got == expected
    else:
        assert list(failed) == [("four", sample)] and got == {**expected, ("four", sample): None}


def test_a_field_that_no_array_holds(engine):
    """As if no bound had been put on it where it enters."""
    wrong = dataclasses.replace(PARAMS)
    object.__setattr__(wrong, "top_k", 2**31)
    expected, _ = run(engine, [("other", TEXT, PARAMS)])
    got, failed = run(engine, [("wrong", TEXT, wrong), ("other", TEXT, PARAMS)])
    assert list(failed) == [("wrong", 0)] and "2147483648" in failed["wrong", 0]
    assert got["other", 0] == expected["other", 0]


def test_views_of_another_size_are_refused_at_once(engine, prompts):
    small = dataclasses.replace(prompts[2], global_views=prompts[2].global_views[:, :-1])
    with pytest.raises(RequestError, match="views of shape"):
        engine.submit(small, PARAMS)
    assert not engine.has_work


def test_a_request_that_cannot_be_queued_leaves_nothing(engine, prompts):
    broken = dataclasses.replace(prompts[0], feature_index=np.full_like(prompts[0].feature_index, 10**6))
    broken.feature_index[-1] = -1
    with pytest.raises(IndexError):
        engine.submit(broken, PARAMS)
    assert not engine.has_work and not engine._scheduler.waiting
