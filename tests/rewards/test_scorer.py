"""Scores of groups: sums, missing rewards, what hangs, and the cache."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slow_rewards  # noqa: F401 (registers functions)
from PIL import Image

from stepjax.config_file import load_recipe
from stepjax.errors import CheckpointError, ConfigError
from stepjax.rewards.cache import Cache, digest
from stepjax.rewards.config import RewardConfig, RewardTerm
from stepjax.rewards.scorer import Group, MissingRewardsError, Scorer
from stepjax.rollouts.rollout import Rollout


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout(content=text, seed=i) for i, text in enumerate(texts)]


def score(config: RewardConfig, record: dict, *texts: str):
    """The scores of one group, and the counts."""

    async def main():
        async with Scorer(config) as scorer:
            (scored,) = await scorer.score([Group(record, rollouts(*texts))])
            return scored, scorer.counts

    return asyncio.run(main())


def config(*names: str, **fields) -> RewardConfig:
    return RewardConfig(terms=tuple(RewardTerm(name) for name in names), **fields)


def test_each_record_has_its_own_verifier():
    async def main():
        async with Scorer(RewardConfig()) as scorer:
            groups = [
                Group({"verifier": "math", "answer": "1/2"}, rollouts("0.5", "0.6")),
                Group({"task": "count", "answer": {"text": "4"}}, rollouts("four", "", "5")),
                Group({"task": "transcribe", "answer": {"text": "407"}}, rollouts("407")),
                Group({"answer": "x"}, []),
            ]
            return await scorer.score(groups)

    values = [[each.value for each in group] for group in asyncio.run(main())]
    assert values == [[1, 0], [1, 0, 0], [1], []]


def test_a_reward_is_the_weighted_sum_of_its_parts():
    terms = (RewardTerm("verifier", 0.5), RewardTerm("fails", 2), RewardTerm("short", 0.25), RewardTerm("after", 0))
    (first, second), _ = score(RewardConfig(terms=terms), {"answer": "ab"}, "ab", "abcd")
    assert first.value == pytest.approx(0.5 + 2 * 0.37 - 0.25)
    assert first.parts == {"verifier": 1, "fails": 0.37, "short": -1, "after": 2}
    assert second.value == pytest.approx(2 * 0.37) and second.notes == ()


def test_a_follow_up_sees_the_verifier_though_it_is_no_term():
    (scored,), _ = score(config("after"), {"answer": "ab"}, "ab")
    assert scored.value == 2 and scored.parts == {"verifier": 1, "after": 2}


@pytest.mark.parametrize(
    "name, text, note",
    [
        ("fails", "raise", "ValueError: no luck"),
        ("fails", "record", "the record has no luck"),
        ("fails", "die", "its process down, with status 3"),
        ("fails", "fill", "MiB of memory"),
        ("fails", "none", "cannot decide"),
        ("spins", "spin", "more than 0.5 seconds"),
    ],
)
def test_a_failure_is_a_missing_reward_and_never_0(name, text, note):
    (bad, good), counts = score(config(name, "short", deadline=0.5), {}, text, "fine")
    assert bad.value is None and bad.parts == {name: None, "short": 0} and note in bad.notes[0]
    assert good.value is not None and good.value > 0
    assert counts["missing"] == 1 and counts[f"missing/{name}"] == 1 and counts["rollouts"] == 2


def test_a_verifier_that_hangs_is_ended_and_the_next_call_works(tmp_path):
    record = {"file": str(tmp_path / "process")}

    async def main():
        async with Scorer(config("sleeps", deadline=0.25, max_missing=1, workers=1)) as scorer:
            begin = time.monotonic()
            (hung,) = await scorer.score([Group(record, rollouts("sleep", "wake"))])
            assert time.monotonic() - begin < 30  # six times the deadline, and a process's start
            (well,) = await scorer.score([Group(record, rollouts("wake", "up"))])
            return hung, well

    hung, well = asyncio.run(main())
    assert [each.value for each in hung] == [None, 1] and "more than 0.25 seconds" in hung[0].notes[0]
    assert [each.value for each in well] == [1, 1]
    assert not Path(f"/proc/{(tmp_path / 'process').read_text()}").exists()


def test_gold_that_cannot_be_parsed_is_missing_and_so_is_what_takes_too_long():
    (scored, _), _ = score(RewardConfig(), {"verifier": "math", "answer": r"\frac{"}, "3", "")
    assert scored.value is None and "math cannot decide" in scored.notes[0]
    limited = RewardConfig(deadline=1)
    (slow, quick), _ = score(limited, {"verifier": "math", "answer": r"\sqrt{2}"}, "9^{9^{9^9}}", r"\boxed{2^{1/2}}")
    assert slow.value in (None, 0) and quick.value == 1


def test_too_many_missing_rewards_stop_the_run():
    async def main():
        async with Scorer(config("fails", max_missing=0.2, missing_window=10)) as scorer:
            for texts in (["none"] * 2 + ["fine"] * 8, ["fine"] * 9 + ["none"]):  # 2 of the last 10, then 1
                await scorer.score([Group({}, rollouts(*texts))])
            await scorer.score([Group({}, rollouts("none", "none", "fine"))])

    message = r"3 of the last 10 rewards .*max_missing=0.2 of 10: fails: fails cannot decide \(3 times\)"
    with pytest.raises(MissingRewardsError, match=message):
        asyncio.run(main())


def test_one_bad_record_does_not_stop_the_run(caplog):
    scored, counts = score(config("fails"), {}, *["none"] * 16)
    assert counts["missing"] == 16 and all(each.value is None for each in scored)
    assert "16 of 16 rewards are missing: fails: fails cannot decide" in caplog.text


def test_what_a_function_may_not_return_and_terms_that_do_not_exist():
    with pytest.raises(ConfigError, match="'odd' returned nan"):
        score(config("odd"), {}, "x")
    with pytest.raises(ConfigError, match="reward 'maths': choose from .*math"):
        Scorer(config("maths"))
    for fields in ({"terms": ()}, {"deadline": 0}, {"workers": 0}, {"max_missing": 1.5}, {"cache_size": 0}):
        with pytest.raises(ConfigError, match=f"reward.{next(iter(fields))}="):
            RewardConfig(**fields)


def test_a_function_of_ones_own_beside_the_recipe(tmp_path):
    source = (
        "from stepjax.rewards.registry import reward\n\n"
        "@reward('{name}')\ndef longer(record, text):\n    return float(len(text) > 2)\n"
    )
    recipe = (
        "from stepjax.config import BatchConfig, DataConfig, Phase, PretrainConfig, ScheduleConfig\n{more}\n"
        "schedule = ScheduleConfig(phases=(Phase(tokens=1, start=0, end=0),))\n"
        "config = PretrainConfig(name='a', data=DataConfig(), batch=BatchConfig(rows=1), schedule=schedule)\n"
    )
    (tmp_path / "my_rewards.py").write_text(source.format(name="longer"))
    (tmp_path / "good.py").write_text(recipe.format(more="import my_rewards"))
    (tmp_path / "bad.py").write_text(recipe.format(more=source.format(name="lost")))
    load_recipe(tmp_path / "good.py")
    scored, _ = score(config("longer"), {}, "ab", "abc")
    assert [each.value for each in scored] == [0, 1]
    with pytest.raises(ConfigError, match="'lost' is defined in recipe_bad.* beside the recipe"):
        load_recipe(tmp_path / "bad.py")


def test_verdicts_are_cached_by_what_they_depend_on(tmp_path):
    calls = tmp_path / "calls"
    record = {"file": str(calls), "answer": "a"}
    cached = config("counted", cache=str(tmp_path / "verdicts"))

    def num_calls() -> int:
        return len(calls.read_text().splitlines())

    scored, _ = score(cached, record, "ab", "ab", "abc")
    assert [each.value for each in scored] == [0.2, 0.2, 0.3] and num_calls() == 2  # equal texts are judged once
    scored, counts = score(cached, record, "abc", "ab", "abcd")
    assert [each.value for each in scored] == [0.3, 0.2, 0.4] and num_calls() == 3 and counts["cached"] == 2
    score(cached, {**record, "answer": "b"}, "abc")
    assert num_calls() == 4


def test_missing_verdicts_are_not_cached(tmp_path):
    cached = config("fails", cache=str(tmp_path / "verdicts"))
    for _ in range(2):
        (scored,), counts = score(cached, {}, "none")
        assert scored.value is None and counts["cached"] == 0


def test_the_cache_is_bounded_and_survives_a_kill(tmp_path):
    path = str(tmp_path / "verdicts")
    code = (
        "import os, signal; from stepjax.rewards.cache import Cache; cache = Cache({!r}, 10)\n"
        "for i in range(25): cache.put(str(i), i / 10)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code.format(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    cache = Cache(path, 10)
    assert [cache.get(str(i)) for i in range(25)] == [None] * 15 + [i / 10 for i in range(15, 25)]
    cache.close()


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "verdicts"
    path.write_text("no database" * 100)
    with pytest.raises(CheckpointError, match=f"the cache of verdicts {path} cannot be used"):
        Scorer(RewardConfig(cache=str(path)))


def test_digests_depend_on_pictures():
    black, white = (Image.new("L", (2, 2), colour) for colour in (0, 255))
    assert digest({"image": black}) == digest({"image": black.copy()}) != digest({"image": white})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) and digest("\udcff") != digest("?")


def test_images_stay_out_of_the_workers():
    content = [{"type": "image", "image": Image.new("L", (2, 2))}, {"type": "text", "text": "q"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]}
    (scored,), _ = score(RewardConfig(), record, "a cat")
    assert scored.value == 1


def test_workers_import_no_jax(tmp_path):
    code = "import stepjax.rewards.verifiers, sys; assert 'jax' not in sys.modules and 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
