"""A plan of a real compilation: its estimate, its table and its JSON."""

import dataclasses
import json
import math
import os

import jax
import pytest

from stepjax.models.flops import training_flops
from stepjax.planning.estimate import EXPOSED_COLLECTIVES, PARTS
from stepjax.planning.plan import StepPlan, make_plan
from stepjax.planning.report import advice, to_json, to_text
from stepjax.planning.steps import Shortage
from stepjax.planning.topologies import find
from stepjax.training.footprint import Memory, predict_memory

REQUIRED = (
    "fits",
    "hbm_gib",
    "hbm_limit_gib",
    "estimated_step_seconds",
    "estimated_mfu",
    "tokens_per_second_per_chip",
    "compile_seconds",
    "mesh",
    "remat",
)


@pytest.fixture(scope="module")
def tiny_plan(tiny):
    """The tiny recipe on four chips of v5p: one compilation, which the tests of this module share."""
    pytest.importorskip("libtpu")
    return make_plan(tiny, find("v5p-8"))


@pytest.fixture(scope="module")
def fields(tiny_plan):
    return json.loads(json.dumps(to_json(tiny_plan)))


def test_the_estimate_is_the_sum_of_its_parts(tiny_plan, fields):
    estimate = tiny_plan.estimate
    assert estimate.seconds == pytest.approx(sum(cost.seconds for cost in estimate.costs))
    assert sum(s for row in fields["seconds_by_part"].values() for s in row.values()) == pytest.approx(estimate.seconds)
    assert set(fields["seconds_by_part"]) <= set(PARTS)


def test_memory_of_the_compiled_step(tiny_plan):
    step = tiny_plan.step
    assert step.fits and step.shortage is None
    parts = step.parameter_bytes + step.optimizer_bytes + step.batch_bytes
    assert step.optimizer_bytes >= 2 * step.parameter_bytes
    # Arguments are padded to whole tiles, never cut.
    assert parts <= step.argument_bytes < step.total_bytes
    assert step.alias_bytes >= step.parameter_bytes, "the state is donated"
    assert tiny_plan.memory.total == pytest.approx(tiny_plan.hbm_gib, rel=1e-6)
    assert min(dataclasses.astuple(tiny_plan.memory)) >= 0


def test_the_environment_is_left_as_it_was(tiny_plan):
    if jax.__version_info__ < (0, 11):  # conftest sets it for these
        assert "xla_cpu" in os.environ["XLA_FLAGS"]


def test_everything_in_the_program_was_understood(tiny_plan):
    assert not tiny_plan.estimate.unknown


def test_every_part_of_the_model_takes_time(fields):
    for part in ("encoder attention", "encoder MLP", "projector", "embedding", "decoder attention", "decoder MLP"):
        row = fields["seconds_by_part"][part]
        assert row["forward"] > 0 and row["backward"] > 0, part
    for part in ("loss", "optimizer"):
        assert sum(fields["seconds_by_part"][part].values()) > 0
    assert fields["seconds_by_part"]["decoder MLP"]["recomputed"] > 0, "remat=full computes again"
    assert sum(fields["seconds_by_part"]["optimizer"].values()) < 0.5 * fields["estimated_step_seconds"]


def test_attention_kernels_were_found(tiny_plan):
    kernels = [cost for cost in tiny_plan.estimate.costs if cost.kind == "attention kernel"]
    assert {cost.part for cost in kernels} == {"encoder attention", "decoder attention"}
    assert {cost.direction for cost in kernels} == {"forward", "recomputed", "backward"}


def test_the_parameters_travel(tiny_plan, fields):
    collectives = fields["collectives"]
    assert collectives["all-gather"]["largest_group"] == 4
    assert sum(row["exposed_seconds"] for row in collectives.values()) == pytest.approx(
        sum(fields["seconds_by_part"][EXPOSED_COLLECTIVES].values())
    )
    # One kind may wait behind another on the same wires; all of them wait for no more than all of them take.
    assert sum(row["exposed_seconds"] for row in collectives.values()) <= sum(
        row["seconds"] for row in collectives.values()
    )


def test_the_largest_costs_name_lines_of_the_source(fields):
    largest = fields["largest_costs"]
    assert len(largest) == 10
    assert [item["seconds"] for item in largest] == sorted((item["seconds"] for item in largest), reverse=True)
    assert sum(".py:" in item["source"] for item in largest) >= 5


def test_json_has_its_fields(tiny_plan, fields):
    assert set(REQUIRED) <= set(fields)
    assert fields["fits"] is True
    assert fields["hbm_gib"] < fields["hbm_limit_gib"] == 95.73
    assert fields["mesh"] == {"slice": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert fields["remat"] == "full" and fields["chips"] == 4
    seconds, tokens = fields["estimated_step_seconds"], 4 * 128
    assert fields["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert fields["tokens_per_second_per_chip"] == pytest.approx(tokens / seconds / 4)
    assert fields["days_for_1_2t_tokens"] == pytest.approx(1.2e12 / tokens * seconds / 86400)
    assert fields["estimated_mfu"] == pytest.approx(fields["model_flops_per_step"] / seconds / (4 * 459e12))
    assert 0 < fields["estimated_mfu"] < 1


def test_flops_are_those_of_full_slots(tiny_plan):
    config = tiny_plan.config
    assert tiny_plan.flops == training_flops(
        config.model,
        tokens=512,
        attention_pairs=4 * 128 * 129 / 2,
        global_views=8,
        crops=16,
        global_grid=4,
        crop_grid=2,
    )


def test_the_table_shows_every_part_and_says_what_it_rests_on(tiny_plan):
    text = to_text(tiny_plan)
    for words in ("tiny on v5p-8", "79,248", "GiB of 95.73", "decoder MLP", "all-gather", "largest costs", "rests on"):
        assert words in text
    assert "NOT UNDERSTOOD" not in text and "DOES NOT FIT" not in text
    assert max(map(len, text.splitlines())) < 200


# Plans that do not fit, from a shortage that is made up: the real ones take long to be refused.


@pytest.fixture(scope="module")
def large(tiny_plan):
    """A plan of many rows, which the compiler is said to refuse."""
    batch = dataclasses.replace(tiny_plan.config.batch, rows=4096, tokens=16384)
    config = dataclasses.replace(tiny_plan.config, batch=batch)
    memory = predict_memory(config, 4)
    limit = 0.4 * memory.total
    step = dataclasses.replace(tiny_plan.step, shortage=Shortage(1.2 * memory.total, limit, "RESOURCE_EXHAUSTED: ..."))
    return StepPlan(config, tiny_plan.topology, step, memory, None)


def test_json_of_a_plan_that_does_not_fit(large):
    fields = json.loads(json.dumps(to_json(large)))
    assert set(REQUIRED) <= set(fields)
    assert fields["fits"] is False and fields["estimated_step_seconds"] is None
    assert fields["hbm_gib"] == pytest.approx(1.2 * large.memory.total, abs=1e-3)
    assert any("batch.accumulation" in line for line in fields["advice"])


def test_the_table_of_a_plan_that_does_not_fit(large):
    text = to_text(large)
    assert "DOES NOT FIT" in text and "what would help" in text and "--batch.accumulation" in text


def test_advice_begins_with_the_smallest_change_that_suffices(large):
    lines = advice(large.config, 4, large.limit_gib, None)
    enough = [line for line in lines if line.endswith("fits") and "barely" not in line]
    assert enough and lines[: len(enough)] == enough
    first = enough[0]
    assert first.startswith("--batch.")
    # Doing what it says leaves less than the limit, by the same arithmetic.
    option, value = first.split()[:2]
    name = option.removeprefix("--batch.")
    changed = dataclasses.replace(large.config.batch, **{name: int(value)})
    assert predict_memory(dataclasses.replace(large.config, batch=changed), 4).total < large.limit_gib


def test_advice_names_the_kernel_where_scores_are_held_whole(tiny):
    config = dataclasses.replace(tiny, numerics=dataclasses.replace(tiny.numerics, attention="xla"))
    config = dataclasses.replace(config, batch=dataclasses.replace(tiny.batch, tokens=65536))
    lines = advice(config, 4, 15.75, 64.0)
    assert any("--numerics.attention auto" in line and "fits" in line for line in lines)


# Arithmetic


def test_policies_keep_more_and_more(tiny):
    kept = []
    for policy in ("full", "attention", "dots", "none"):
        numerics = dataclasses.replace(tiny.numerics, remat=policy)
        kept.append(predict_memory(dataclasses.replace(tiny, numerics=numerics), 4).activations)
    assert kept == sorted(kept) and len(set(kept)) == 4


def test_what_full_rematerialisation_keeps_is_the_input_of_every_layer(tiny):
    # bfloat16, a row a device: a decoder layer of width 32, an encoder layer of width 16 over 2 x 16 + 4 x 4 patches.
    expected = 2 * (128 * 32 + (2 * 16 + 4 * 4) * 16)
    assert predict_memory(tiny, 4).activations * 2**30 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("section", "changes", "parts"),
    [
        ("batch", {"accumulation": 2}, ("activations",)),
        ("mesh", {"tensor": 2}, ("temporaries",)),
        ("mesh", {"context": 2}, ("activations",)),
    ],
)
def test_what_spreads_memory(tiny, section, changes, parts):
    roomy = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, rows=16, tokens=4096))
    other = dataclasses.replace(roomy, **{section: dataclasses.replace(getattr(roomy, section), **changes)})
    before, after = predict_memory(roomy, 8), predict_memory(other, 8)
    per_row = 2 if section == "mesh" else 1  # a smaller data group holds more rows each
    for part in parts:
        assert getattr(after, part) < per_row * getattr(before, part)


def test_a_total_is_the_sum():
    assert Memory(1, 2, 3, 4, 5, 6).total == 21
    assert math.isclose(Memory(0.5, 0, 0, 0, 0, 0).total, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slices", "changes"),
    [
        ("v5e-4", 1, {}),
        ("v5e-4", 2, {"slice": 2}),
        ("v6e-4", 1, {"tensor": 2, "data": 2, "fsdp": 1}),
        ("tpu7x-8", 1, {"context": 2}),
    ],
)
def test_programs_for_other_chips_and_meshes_are_understood(tiny, name, slices, changes):
    pytest.importorskip("libtpu")
    model = tiny.model
    decoder = dataclasses.replace(model.decoder, num_kv_heads=2)
    batch = dataclasses.replace(tiny.batch, rows=16, accumulation=2)
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(model, decoder=decoder),
        batch=batch,
        mesh=dataclasses.replace(tiny.mesh, **changes),
    )
    plan = make_plan(config, find(name, slices))
    assert plan.fits and plan.estimate is not None
    assert not plan.estimate.unknown
    assert {traffic.group for traffic in plan.estimate.traffic} - {1}
    assert plan.hbm_gib < plan.limit_gib
