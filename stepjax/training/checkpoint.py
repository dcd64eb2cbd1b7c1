"""Checkpoints: the whole train state, the data position and the configuration, saved together by Orbax.

On disk, under one directory a run:

    200/state/   the train state as a flat dict from name to array: "step", "model/decoder/embed", "opt_state/1/mu/..."
    200/data/    JSON: the position of the data iterator
    200/meta/    JSON: format, step, configuration, package versions, digests of all of it

Orbax writes a checkpoint beside its place and renames it when complete, so a run killed at any instant leaves the
previous one intact, and never a half one that looks whole. Random keys are not stored: they derive from the seed and
the step.

What is read is compared with what was saved: flipped bits, files that an interrupted copy left out, and renamed
directories are errors. The arrays' digests are of their values (`stepjax.training.digests`), taken on the devices
before the save begins, so they hold for any storage, any sharding, and for single arrays.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from stepjax.errors import CheckpointError
from stepjax.sharding import named_leaves
from stepjax.training.digests import digests

FORMAT = 2  # format 1 had no digests, and is still read
MODEL = "model/"  # prefix of the names of the model's arrays
PACKAGES = ("stepjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

State = TypeVar("State")
Arrays = dict[str, Any]

_log = logging.getLogger("stepjax.checkpoint")


class Checkpointer:
    """Saves and restores a run's checkpoints; keeps the last `keep`. Use one per run, and close it.

    `directory` may be local or a bucket ("gs://..."). `config`, a dataclass or plain data, is stored with every
    checkpoint. Opening a directory removes what killed saves left there: while a run is alive only its trainer may do
    so; others read with `restore_model` and `read_meta`.
    """

    def __init__(self, directory: str | epath.PathLike, *, keep: int, config: Any = None):
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep={keep!r}: must be at least 1")
        self.directory = _absolute(directory)
        self._config = json.loads(_json(config, "config"))
        self._manager = _manager(
            self.directory, preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], *, wait: bool = False) -> bool:
        """Saves in the background; returns once the arrays are copied, so that they may be donated or deleted.

        Waits for the save under way first, and raises its error. Leaves a step alone that is saved already, and returns
        False. Every process calls this, with the same `data_state`: it describes the whole global batch.

        Raises:
            CheckpointError: a later step is saved, which would shadow this one on resume; or JSON would change
                `data_state` (only strings as keys, lists for tuples).
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        if (latest := self._manager.latest_step()) is not None and step < latest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.directory}: step {latest} is saved there and would be taken on "
                f"resume; remove the later checkpoints, or give the run another name"
            )
        data_copy = json.loads(_json(data_state, "data_state"))  # it is written in the background
        if data_copy != data_state:
            raise CheckpointError("data_state would be changed by JSON: use strings as keys, and lists for tuples")
        data_digest = _digest(data_copy)
        multihost_utils.assert_equal(np.uint32(int(data_digest[:8], 16)), "data_state differs between processes")
        arrays = _named_arrays(state)
        about = {"format": FORMAT, "step": step, "config": self._config, "versions": _versions()}
        meta = sealed(about | {"data": data_digest, "arrays": digests(arrays)})
        items = {
            "state": ocp.args.PyTreeSave(arrays),
            "data": ocp.args.JsonSave(data_copy),
            "meta": ocp.args.JsonSave(meta),
        }
        saved = self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        assert saved, f"step {step} was not saved"
        if wait:
            self.wait()
        return True

    def latest_step(self) -> int | None:
        """The last step saved completely, or None."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, state_like: State, step: int | None = None) -> tuple[State, dict[str, Any], dict[str, Any]]:
        """The train state of `step` (the latest by default), the data position, and the metadata.

        `state_like` gives the structure, shapes, types and shardings, by arrays or by `jax.ShapeDtypeStruct`s; every
        array is read straight onto its sharding, which may differ from the saved one. Leaves without a sharding go to
        the first local device.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it does not hold exactly these names, shapes
                and types; the message lists all that differ.
        """
        self.wait()
        saved = _Saved(self._manager, step)
        wanted = _named_arrays(state_like)
        saved.check_holds(wanted, saved.shapes, types=True)
        data_state = saved.json("data")
        if saved.meta.get("data") not in (None, _digest(data_state)):
            raise saved.damaged("'data', the data position, is not what was saved")
        state = jax.tree.unflatten(jax.tree.structure(state_like), saved.read(wanted))
        return state, data_state, saved.meta

    def wait(self) -> None:
        """Blocks until the save under way, if any, is complete; raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restore_model(path: str | epath.PathLike, model_like: State) -> State:
    """The model of a checkpoint; the rest of the state stays on disk.

    `path` is a run's checkpoint directory (the latest step is taken) or one step in it. `model_like` is as in
    `Checkpointer.restore`, except that its types may differ from the stored ones: arrays are cast as they are read.
    Raises CheckpointError as there.
    """
    wanted = _named_arrays(model_like)
    arrays = restore_parameters(path, wanted, all_of_them=True)
    return jax.tree.unflatten(jax.tree.structure(model_like), list(arrays.values()))


def restore_parameters(path: str | epath.PathLike, wanted: Arrays, *, all_of_them: bool = False) -> Arrays:
    """Some parameters of a model by name, each cast and put onto its sharding; the others stay on disk.

    Raises CheckpointError as `restore_model`; for parameters that are not wanted only if `all_of_them` should be.
    """
    with _opened(path) as saved:
        named = {MODEL + name: array for name, array in wanted.items()}
        stored = {name: array for name, array in saved.shapes.items() if name.startswith(MODEL)}
        if not all_of_them:
            stored = {name: array for name, array in stored.items() if name in named}
        saved.check_holds(named, stored, types=False)
        # Digests are of the stored types. Arrays to cast come in groups, which together take no more than the largest.
        casts = {name: stored[name] for name in named if stored[name].dtype != named[name].dtype}
        arrays: Arrays = {}
        for names in filter(None, [[name for name in named if name not in casts], *_groups(casts)]):
            layouts = {name: named[name].sharding for name in names}
            like = {n: jax.ShapeDtypeStruct(stored[n].shape, stored[n].dtype, sharding=layouts[n]) for n in names}
            found = dict(zip(names, saved.read(like), strict=True))
            arrays |= _cast({name: named[name].dtype for name in names}, layouts)(found) if names[0] in casts else found
        return {name: arrays[MODEL + name] for name in wanted}


def stored_parameters(path: str | epath.PathLike) -> tuple[str, Arrays]:
    """The step that `path` stands for, as a path of its own, and its parameters' shapes and types by name."""
    with _opened(path) as saved:
        arrays = {n.removeprefix(MODEL): array for n, array in saved.shapes.items() if n.startswith(MODEL)}
        return saved.path, arrays


def read_meta(path: str | epath.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint: "step", "config", "versions" and others. `path` is as in `restore_model`."""
    with _opened(path) as saved:
        return saved.meta


# Reading -------------------------------------------------------------------------------------------------------------


class _Saved:
    """A step that was saved completely."""

    def __init__(self, manager: ocp.CheckpointManager, step: int | None = None):
        """`step` is the latest by default."""
        steps = sorted(manager.all_steps())
        if not steps:
            raise CheckpointError(f"{manager.directory} holds no complete checkpoint; check the path")
        if step is not None and step not in steps:
            raise CheckpointError(f"{manager.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        self._manager, self._step = manager, steps[-1] if step is None else step
        self._others = [other for other in steps if other != self._step]
        self.path = str(epath.Path(manager.directory) / str(self._step))
        self.meta = self._checked_meta()

    def damaged(self, what: str) -> CheckpointError:
        remedy = "there is no other: start from a copy, or a new run"
        if self._others:
            remedy = f"{', '.join(map(str, self._others))}; to resume from step {self._others[-1]}, remove {self.path}"
        return CheckpointError(f"{self.path}: {what}; use another step: {remedy}")

    def json(self, item: str) -> dict[str, Any]:
        path = epath.Path(self.path) / item / "metadata"
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise self.damaged(f"{path} is not a regular file")
        try:
            fields = self._manager.restore(self._step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        except Exception as error:  # Orbax raises bare ones
            raise self.damaged(f"{item!r} is missing or damaged") from error
        if not isinstance(fields, dict):
            raise self.damaged(f"{item!r} is damaged")
        return fields

    def _checked_meta(self) -> dict[str, Any]:
        meta = self.json("meta")
        if meta.get("format") not in (1, FORMAT):
            raise CheckpointError(
                f"{self.path} has format {meta.get('format')!r}, this version of stepjax reads {FORMAT}; "
                f"use the version that wrote it: {meta.get('versions')}"
            )
        if meta["format"] == 1:
            _log.warning("%s was written by an older version, without digests: it is not checked for damage", self.path)
        elif sealed(meta)["digest"] != meta.get("digest"):
            raise self.damaged("'meta' is not what was saved")
        if meta.get("step") != self._step:
            raise self.damaged(f"it holds step {meta.get('step')!r}, and was renamed or copied to {self._step}")
        return meta

    @functools.cached_property
    def shapes(self) -> Arrays:
        """Shapes and types of all arrays by name."""
        try:
            metadata = self._manager.item_metadata(self._step)["state"].tree
            shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in metadata.items()}
            chunks = {name: array.storage and array.storage.chunk_shape for name, array in metadata.items()}
        except Exception as error:
            raise self.damaged(f"'state' is missing or damaged ({_reason(error)})") from error
        for name, chunk in chunks.items():
            if not is_sane_chunk(chunk or (), shapes[name].shape):
                raise self.damaged(f"{name} of shape {shapes[name].shape} is stored in chunks of {chunk}")
        return shapes

    def check_holds(self, wanted: Arrays, stored: Arrays, *, types: bool) -> None:
        def show(array: Any) -> str:
            return f"{array.dtype.name}{list(array.shape)}"

        def differs(a: Any, b: Any) -> bool:
            return a.shape != b.shape or types and a.dtype != b.dtype

        problems = [f"  missing: {name} {show(wanted[name])}" for name in wanted if name not in stored]
        problems += [f"  unexpected: {name} {show(stored[name])}" for name in stored if name not in wanted]
        problems += [
            f"  different: {name} is {show(stored[name])}, wanted {show(array)}"
            for name, array in wanted.items()
            if name in stored and differs(stored[name], array)
        ]
        if problems:
            raise CheckpointError(
                "\n".join([f"{self.path} does not fit this configuration:", *problems])
                + "\nUse the configuration it was saved with (meta/ holds it), or start a run of another name."
            )

    def read(self, wanted: Arrays) -> list[jax.Array]:
        """The wanted arrays in order, each on its sharding, compared with their digests; others stay on disk."""
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        try:
            arrays = self._manager.restore(self._step, args=ocp.args.Composite(state=arguments))["state"]
        except jax.errors.JaxRuntimeError:
            raise  # such as too little memory
        except Exception as error:  # Orbax raises bare ones
            sys.unraisablehook = functools.partial(_without_orbax, sys.unraisablehook)
            raise self.damaged(f"an array is missing or damaged ({_reason(error)})") from error
        if self.meta["format"] > 1:
            found = digests({name: arrays[name] for name in wanted})
            changed = [name for name in wanted if found[name] != self.meta["arrays"].get(name)]
            if changed:
                more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
                raise self.damaged(f"{', '.join(changed[:5])}{more}: the values are not those that were saved")
        return [arrays[name] for name in wanted]


@contextlib.contextmanager
def _opened(path: str | epath.PathLike) -> Iterator[_Saved]:
    """The step that a path to a run's checkpoints, or to one of them, stands for."""
    directory = _absolute(path)
    step = None
    if directory.name.isdigit() and (directory / "state").exists():
        step, directory = int(directory.name), directory.parent
    if not directory.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    with _manager(directory, create=False) as manager:
        yield _Saved(manager, step)


def _manager(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, text = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("state", ocp.args.PyTreeRestore, state)
    for item in ("data", "meta"):
        registry.add(item, ocp.args.JsonSave, text)
        registry.add(item, ocp.args.JsonRestore, text)
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options), handler_registry=registry)


def _absolute(path: str | epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else epath.Path(path.absolute())


def is_sane_chunk(chunk: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether chunks are within their array: reading allocates memory for a whole chunk first."""
    return all(0 < part <= max(size, 1) for part, size in zip(chunk, shape, strict=False))


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).partition("[")[0].strip()[:300]  # TensorStore adds its whole specification


def _without_orbax(report: Callable[[Any], Any], what: Any) -> None:
    """When one of its readers fails, Orbax abandons the others, and Python would report each at length."""
    code = getattr(what.object, "cr_code", None)
    if "orbax" not in str(code) and "Event loop is closed" not in str(what.exc_value):
        report(what)


def _groups(arrays: Arrays) -> list[list[str]]:
    """Names in groups that are no larger than the largest array, from large to small."""
    sizes = {name: array.size * array.dtype.itemsize for name, array in arrays.items()}
    groups: list[list[str]] = []
    left = 0
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if not groups or sizes[name] > left:
            groups.append([])
            left = max(sizes.values())
        groups[-1].append(name)
        left -= sizes[name]
    return groups


def _cast(types: Mapping[str, Any], layouts: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    return jax.jit(lambda arrays: {name: x.astype(types[name]) for name, x in arrays.items()}, out_shardings=layouts)


def _named_arrays(tree: Any) -> Arrays:
    """The arrays of a pytree by parameter name; abstract ones with a sharding."""
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        (array,) = jax.tree.leaves(leaf)
        if isinstance(array, jax.ShapeDtypeStruct) and array.sharding is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            array = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
        assert isinstance(array, jax.Array | jax.ShapeDtypeStruct), f"{name} is a {type(array)}, not a JAX array"
        arrays[name] = array
    return arrays


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with a digest of all the rest of it."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return rest | {"digest": _digest(rest)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=dataclasses.asdict)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be stored as JSON: {error}") from error


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # such as stepjax run from a checkout
    return versions
