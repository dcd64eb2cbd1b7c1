"""Checkpoints: bit-exact, on any sharding, and never half-written."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stepjax.config import OptimizerConfig
from stepjax.errors import CheckpointError
from stepjax.training.checkpoint import Checkpointer, read_meta, restore_model, sealed
from stepjax.training.optimizer import make_optimizer, named_leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA_STATE = {"streams": [{"position": 3, "rng": "a1"}, {"position": 5, "rng": None}], "epoch": 0.5}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    step: Any
    model: Any
    opt_state: Any


class Block(nnx.Module):
    def __init__(self, normal, width: int):
        self.kernel = nnx.Param(jnp.asarray(normal(2, 8, width), jnp.float32), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.asarray(normal(2, 8), jnp.bfloat16), axes=("embed",))


class Model(nnx.Module):
    def __init__(self, normal, width: int = 4):
        self.decoder = Block(normal, width)
        self.heads = nnx.List([nnx.Param(jnp.asarray(normal(8, 3), jnp.float32), axes=("embed", "vocab"))])


def train_state(seed: int = 0, width: int = 4) -> Any:
    generator = np.random.default_rng(seed)
    model: Any = Model(lambda *shape: generator.normal(size=shape), width)
    optimizer = make_optimizer(OptimizerConfig(freeze=("scale",)), lambda _: 1e-3, model)
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(generator.integers(0, 99, x.shape), x.dtype), optimizer.init(model)
    )  # moments that are not all zero
    return TrainState(step=jnp.int32(seed), model=model, opt_state=opt_state)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_identical(actual: Any, expected: Any) -> None:
    """Same tree, same types, same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (name, a), b in zip(named_leaves(actual).items(), named_leaves(expected).values(), strict=True):
        (a,), (b,) = jax.tree.leaves(a), jax.tree.leaves(b)
        assert a.dtype == b.dtype, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_round_trip_is_bit_exact_with_data_position_and_metadata(tmp_path):
    state = train_state(7)
    with Checkpointer(tmp_path / "checkpoints", keep=2, config=OptimizerConfig(freeze=("scale",))) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(7, state, DATA_STATE)
        restored, data_state, meta = checkpointer.restore(abstract(state))
        assert_identical(restored, state)
        assert restored.model.decoder.kernel.get_metadata()["axes"] == ("embed", "mlp")
        assert data_state == DATA_STATE
        assert (meta["format"], meta["step"], meta["config"]["freeze"]) == (2, 7, ["scale"])
        assert meta["versions"]["jax"] == jax.__version__
        again, _, _ = checkpointer.restore(train_state(1), step=7)  # arrays serve as well as abstract ones
        assert_identical(again, state)
    assert read_meta(tmp_path / "checkpoints") == read_meta(tmp_path / "checkpoints" / "7") == meta


def test_buffers_may_be_donated_right_after_save(tmp_path):
    """Saving returns while the files are still being written; the train step then overwrites the arrays."""

    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    big = {"x": jnp.arange(1 << 22, dtype=jnp.float32), "y": jnp.arange(1 << 21, dtype=jnp.bfloat16)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), big)
    step = jax.jit(overwrite, donate_argnums=0)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        state = step(jax.tree.map(jnp.copy, big))  # compiled before the race starts
        assert all(np.all(np.asarray(x) == -1) for x in jax.tree.leaves(state))
        for number in range(3):
            state = jax.tree.map(jnp.copy, big)
            checkpointer.save(number, state, {})
            for _ in range(4):
                state = step(state)
            jax.block_until_ready(state)
        for number in range(3):
            restored, _, _ = checkpointer.restore(abstract(big), step=number)
            assert_identical(restored, expected)


def test_data_state_is_copied_when_save_returns(tmp_path):
    position = {"streams": [1]}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, position)
        position["streams"].append(2)
        assert checkpointer.restore({"x": jnp.zeros(3)})[1] == {"streams": [1]}


@pytest.mark.parametrize("data_state", [{"a": (1, 2)}, {1: "a"}, {"a": b"bytes"}])
def test_data_state_that_json_would_change_is_refused(tmp_path, data_state):
    with Checkpointer(tmp_path, keep=1) as checkpointer, pytest.raises(CheckpointError, match="data_state"):
        checkpointer.save(1, {"x": jnp.ones(3)}, data_state)
    assert not list(tmp_path.iterdir())


def test_keeps_the_last_n_and_reopens(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3, 4):
            assert checkpointer.save(step, {"x": jnp.full(3, step)}, {"step": step}, wait=step == 2)
        assert not checkpointer.save(4, {"x": jnp.full(3, -1)}, {"step": -1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() == 4
        state, data_state, _ = checkpointer.restore({"x": jnp.zeros(3, jnp.int32)})
        assert (int(state["x"][0]), data_state) == (4, {"step": 4})
        assert int(checkpointer.restore({"x": jnp.zeros(3, jnp.int32)}, step=3)[0]["x"][0]) == 3
        with pytest.raises(CheckpointError, match=r"no step 2; it has 3, 4"):
            checkpointer.restore({"x": jnp.zeros(3, jnp.int32)}, step=2)
        with pytest.raises(CheckpointError, match="step 2 cannot be saved.*later step 4 saved"):
            checkpointer.save(2, {"x": jnp.zeros(3)}, {})


def test_all_differences_are_listed_at_once(tmp_path):
    state = train_state(0)
    other = train_state(0, width=5)
    other.model.extra = nnx.Param(jnp.ones(2), axes=("embed",))
    del other.model.heads
    other.step = jnp.float32(0)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(3, state, {})
        with pytest.raises(CheckpointError) as caught:
            checkpointer.restore(abstract(other))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path}/3 does not fit")
    assert "  missing: model/extra float32[2]" in lines
    assert "  unexpected: model/heads/0 float32[8, 3]" in lines
    assert "  different: model/decoder/kernel is float32[2, 8, 4], wanted float32[2, 8, 5]" in lines
    assert "  different: step is int32[], wanted float32[]" in lines
    assert sum("decoder/kernel" in line for line in lines) == 3  # the parameter and its two moments


def test_model_alone_is_restored_and_cast(tmp_path):
    state = train_state(5)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(5, state, DATA_STATE)
    assert_identical(restore_model(tmp_path, abstract(state.model)), state.model)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.model)
    cast = restore_model(tmp_path / "5", half)
    assert_identical(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.model))
    with pytest.raises(
        CheckpointError, match=r"different: model/decoder/kernel is float32\[2, 8, 4\], wanted float32\[2, 8, 6\]"
    ):
        restore_model(tmp_path, abstract(train_state(0, width=6).model))


def test_places_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        read_meta(tmp_path / "absent")
    (tmp_path / "empty" / "9.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "empty" / "9.orbax-checkpoint-tmp" / "state").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        restore_model(tmp_path / "empty", {"x": jnp.zeros(3)})
    with Checkpointer(tmp_path / "empty", keep=1) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpointer.restore({"x": jnp.zeros(3)})
        checkpointer.save(9, {"x": jnp.ones(3)}, {})  # the remains are not in the way
        assert checkpointer.latest_step() == 9
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpointer(tmp_path / "new", keep=0)


def test_opening_removes_what_a_killed_save_left(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, {})
    shutil.copytree(tmp_path / "1", tmp_path / "7.orbax-checkpoint-tmp")
    assert read_meta(tmp_path)["step"] == 1
    assert (tmp_path / "7.orbax-checkpoint-tmp").exists()  # readers leave alone what may be a save under way
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, {"x": jnp.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("item", ["state", "data", "meta"])
def test_damaged_checkpoint_is_named(tmp_path, item):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(2, {"x": jnp.ones(3)}, {})
    shutil.rmtree(tmp_path / "2" / item)
    with Checkpointer(tmp_path, keep=1) as checkpointer, pytest.raises(CheckpointError, match=rf"/2: '{item}'"):
        checkpointer.restore({"x": jnp.ones(3)})


BIG = {"step": (), "model/w": (300, 70), "model/zero": (5000,), "opt_state/m": (300, 70)}


def big_state():
    state = {name: jax.random.normal(jax.random.key(0), shape) for name, shape in BIG.items()}
    return state | {"model/zero": jnp.zeros(BIG["model/zero"])}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    with Checkpointer(directory, keep=2, config={"rate": 0.1}) as checkpointer:
        for step in (4, 8):
            checkpointer.save(step, big_state(), {"position": step}, wait=True)
    return directory


def attempt(directory, expected=8):
    """Restores the latest step; what it has is what was saved."""
    with Checkpointer(directory, keep=2) as checkpointer:
        state, data_state, _ = checkpointer.restore(abstract(big_state()))
    assert_identical(state, big_state())
    assert data_state == {"position": expected}


def data_files(directory):
    """The files that hold arrays; the database's own are small."""
    return [path for path in (directory / "8" / "state").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


@pytest.mark.parametrize("seed", range(8))
def test_bits_that_flip_in_an_array_are_found(tmp_path, two_steps, seed):
    shutil.copytree(two_steps, tmp_path / "run")
    generator = np.random.default_rng(seed)
    path = generator.choice(data_files(tmp_path / "run"))
    data = bytearray(path.read_bytes())
    place = int(generator.integers(len(data)))
    data[place] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run/8: .*; use another step: 4; to resume from step 4, remove"):
        attempt(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "8")
    attempt(tmp_path / "run", expected=4)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [os.remove, cut, lambda path: path.write_bytes(bytes(path.stat().st_size))])
@pytest.mark.filterwarnings("error")  # such as of Orbax's other readers, when one fails
def test_files_that_a_copy_left_out_are_no_zeros(tmp_path, two_steps, harm):
    for path in [
        *data_files(two_steps),
        two_steps / "8" / "state" / "manifest.ocdbt",
        two_steps / "8" / "data" / "metadata",
    ]:
        shutil.copytree(two_steps, tmp_path / "run")
        harm(tmp_path / "run" / path.relative_to(two_steps))
        with pytest.raises(CheckpointError, match="run/8: .*use another step: 4"):
            attempt(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("item, old, new", [("data", "8", "7"), ("meta", "0.1", "0.2"), ("meta", "8", "9")])
def test_a_changed_position_or_configuration_is_found(tmp_path, two_steps, item, old, new):
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run" / "8" / item / "metadata"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=f"run/8: '{item}'.* has changed since it was saved; use another step"):
        attempt(tmp_path / "run")


def test_a_renamed_step_is_refused(tmp_path, two_steps):
    shutil.copytree(two_steps / "4", tmp_path / "run" / "8")
    with pytest.raises(CheckpointError, match="run/8: contains step 4, but was renamed or copied to 8"):
        attempt(tmp_path / "run")
    with pytest.raises(CheckpointError, match="contains step 4"):
        read_meta(tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_alone_is_compared_too(tmp_path, two_steps, dtype):
    """Also where it is cast, while the digests are of what was saved; the rest is neither read nor compared."""
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run" / "8" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    like = {name.removeprefix("model/"): jax.ShapeDtypeStruct(BIG[name], dtype) for name in BIG if "model" in name}
    meta["arrays"]["opt_state/m"] ^= 1
    path.write_text(json.dumps(sealed(meta)))
    for name, x in restore_model(tmp_path / "run", like).items():
        assert_identical(x, big_state()[f"model/{name}"].astype(dtype))
    meta["arrays"]["model/zero"] ^= 1
    path.write_text(json.dumps(sealed(meta)))
    with pytest.raises(CheckpointError, match="model/zero: the values are not those that were saved"):
        restore_model(tmp_path / "run", like)


def test_checkpoints_of_older_versions_are_read_with_a_note(tmp_path, two_steps, caplog):
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run" / "8" / "meta" / "metadata"
    meta = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("arrays", "data", "digest")}
    path.write_text(json.dumps(meta | {"format": 1}))
    attempt(tmp_path / "run")
    assert "run/8 was written by an older version without digests" in caplog.text


def test_other_format_is_refused(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(2, {"x": jnp.ones(3)}, {}, wait=True)
        path = next((tmp_path / "2" / "meta").glob("metadata"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
        with pytest.raises(CheckpointError, match="format 99"):
            checkpointer.restore({"x": jnp.ones(3)})


LAYOUTS = [(8, (2, 4), P("a", "b")), (8, (4, 2), P(("a", "b"))), (4, (1, 4), P(None, "b")), (8, (8, 1), P())]


def spread(layout, place):
    """A state whose arrays are what `place` makes of their values and shardings."""
    devices, shape, spec = layout
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(shape), ("a", "b"))
    weights = np.arange(128, dtype=np.float32).reshape(16, 8)
    return {
        "model": {"w": place(weights, NamedSharding(mesh, spec))},
        "step": place(np.int32(4), NamedSharding(mesh, P())),
    }


def test_restores_onto_any_sharding(tmp_path):
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for step, source in enumerate(LAYOUTS):
            state = spread(source, jax.device_put)
            checkpointer.save(step, state, {})
            for target in LAYOUTS:
                like = spread(target, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))
                restored, _, _ = checkpointer.restore(like, step)
                model = restore_model(tmp_path, like["model"])
                for tree, wanted, numbers in ((restored, like, state), (model, like["model"], state["model"])):
                    for a, b, c in zip(*map(jax.tree.leaves, (tree, wanted, numbers)), strict=True):
                        assert a.sharding == b.sharding
                        np.testing.assert_array_equal(np.asarray(a), np.asarray(c))


# In processes of their own -------------------------------------------------------------------------------------------

SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
from stepjax.training.checkpoint import Checkpointer

checkpointer = Checkpointer(sys.argv[1], keep=1)
first = (checkpointer.latest_step() or 0) + 1
for step in itertools.count(first):
    checkpointer.save(step, {"x": jnp.full(1 << 20, step, jnp.int32), "step": jnp.int32(step)}, {"step": step})
"""


def run(code: str, *arguments: str, **popen: Any) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **popen)


def test_killed_between_and_during_saves_leaves_a_whole_checkpoint(tmp_path):
    """With keep=1, the hardest case: the old checkpoint may go only when the new one is whole."""
    previous = 0
    for _ in range(2):
        process = run(SAVE_FOREVER, str(tmp_path))
        try:
            deadline = time.monotonic() + 60
            while max((int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()), default=0) < previous + 3:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.003)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with Checkpointer(tmp_path, keep=1) as checkpointer:
            latest = checkpointer.latest_step()
            assert latest is not None and latest >= previous + 3
            state, data_state, meta = checkpointer.restore({"x": jnp.zeros(1 << 20, jnp.int32), "step": jnp.int32(0)})
        assert np.all(np.asarray(state["x"]) == latest)
        assert int(state["step"]) == data_state["step"] == meta["step"] == latest
        previous = latest
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(previous + 1, {"x": jnp.zeros(3)}, {})
    assert [path.name for path in tmp_path.iterdir()] == [str(previous + 1)]  # what the kills left is gone
