"""Checkpoints: the whole train state, the data position and the configuration, saved together by Orbax.

On disk, under one directory a run:

    200/state/   the train state as a flat dict from name to array: "step", "model/decoder/embed", "opt_state/1/mu/..."
    200/data/    JSON: where the data iterator stands
    200/meta/    JSON: format, step, configuration, package versions, digests of all of it

A checkpoint is written beside its place and renamed when complete, so a run killed at any instant leaves the previous
one intact and never a half one that looks whole. Random keys are not stored: they derive from the seed and the step.

What is read is compared with what was saved: bits that flipped, files that an interrupted copy left out, and
directories that were renamed are errors. The arrays' digests are of their values (`stepjax.training.digests`), taken on
the devices before the save begins, so that they hold for any storage and any sharding, and for single arrays.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from stepjax.errors import CheckpointError
from stepjax.sharding import named_leaves
from stepjax.training.digests import digests

FORMAT = 2  # 1 had no digests, and is read all the same
MODEL = "model/"  # prefix of the names of the model's arrays
PACKAGES = ("stepjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

State = TypeVar("State")
Arrays = dict[str, Any]

_log = logging.getLogger("stepjax.checkpoint")


class Checkpointer:
    """Saves and restores a run's checkpoints; keeps the last `keep`. Use one per run, and close it.

    `directory` may be local or a bucket ("gs://..."). `config` is any dataclass or mapping that JSON can hold; it is
    stored with every checkpoint. Opening a directory removes what killed saves left there: while a run is alive only
    its trainer should do so; others read with `restore_model` and `read_meta`.
    """

    def __init__(self, directory: str | epath.PathLike, *, keep: int, config: Any = None):
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep={keep!r}: must be at least 1")
        self.directory = _absolute(directory)
        fields = config
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            fields = dataclasses.asdict(config)
        self._config = json.loads(_json(fields, "config"))
        self._manager = _manager(
            self.directory, preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], *, wait: bool = False) -> bool:
        """Saves in the background; returns once the arrays are copied, so that they may be donated or deleted.

        A save still under way is waited for first. A step that is saved already is left alone and False is returned.
        On several hosts every process calls this, with the same `data_state`: it describes the whole global batch.

        Raises CheckpointError where a later step is saved (it would shadow this one on resume), or where JSON would
        change `data_state` (only strings as keys, lists for tuples). An error of the previous background save is raised
        here.
        """
        self.wait()
        latest = self._manager.latest_step()
        if step in self._manager.all_steps():
            return False
        if latest is not None and step < latest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.directory}: step {latest} is saved there and would be taken on "
                f"resume; remove the later checkpoints, or give the run another name"
            )
        data_json = _json(data_state, "data_state")
        data_copy = json.loads(data_json)  # what is written in the background must not change meanwhile
        if data_copy != data_state:
            raise CheckpointError("data_state would be changed by JSON: use strings as keys, and lists for tuples")
        data_digest = _digest(data_copy)
        multihost_utils.assert_equal(np.uint32(int(data_digest[:8], 16)), "data_state differs between processes")
        arrays = _named_arrays(state)
        meta = sealed(
            {
                "format": FORMAT,
                "step": step,
                "config": self._config,
                "versions": _versions(),
                "data": data_digest,
                "arrays": digests(arrays),
            }
        )
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
        array is read straight onto its sharding, whatever it was saved from. Leaves without a sharding go to the first
        local device.

        Raises CheckpointError when there is no such checkpoint, when it is damaged, or when it does not hold exactly
        these names, shapes and types; the message lists all that differ.
        """
        self.wait()
        return _restore(self._manager, state_like, step)

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
    """The model of a checkpoint alone: nothing else is read.

    `path` is a run's checkpoint directory (the latest step is taken) or one step in it. `model_like` is as in
    `Checkpointer.restore`, except that its types may differ from the stored ones: arrays are cast as they are read.
    Raises CheckpointError as there.
    """
    wanted = _named_arrays(model_like)
    return _filled(model_like, list(restore_parameters(path, wanted, all_of_them=True).values()))


def restore_parameters(path: str | epath.PathLike, wanted: Arrays, *, all_of_them: bool = False) -> Arrays:
    """Some parameters of a model by name, each cast and put onto its sharding; what is not wanted stays on disk.

    Raises CheckpointError as `restore_model`; that there are more than the wanted ones only if those are to be all.
    """
    manager, step = _open(path)
    with manager:
        source, meta = _source(manager, step), _read_meta(manager, step)
        named = {MODEL + name: array for name, array in wanted.items()}
        stored = {name: array for name, array in _stored(manager, step).items() if name.startswith(MODEL)}
        if not all_of_them:
            stored = {name: array for name, array in stored.items() if name in named}
        _check_same(stored, named, source, types=False)
        # Digests are of the stored types. What is to be cast comes in groups, of the largest array's size at most.
        casts = {name: stored[name] for name in named if stored[name].dtype != named[name].dtype}
        arrays = {}
        for names in filter(None, [[name for name in named if name not in casts], *_groups(casts)]):
            layouts = {name: named[name].sharding for name in names}
            like = {name: _placed(stored[name], layouts[name]) for name in names}
            arrays |= zip(names, _read(manager, step, like, meta), strict=True)
            if casts.keys() & names:
                cast = {name: arrays.pop(name) for name in names}
                arrays |= _cast({name: named[name].dtype for name in names}, layouts)(cast)
        return {name: arrays[MODEL + name] for name in wanted}


def stored_parameters(path: str | epath.PathLike) -> tuple[str, Arrays]:
    """The step that `path` stands for, as a path of its own, and its parameters' shapes and types by name."""
    manager, step = _open(path)
    with manager:
        stored = _stored(manager, step).items()
        return _source(manager, step), {n.removeprefix(MODEL): array for n, array in stored if n.startswith(MODEL)}


def read_meta(path: str | epath.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint: "step", "config", "versions" and others. `path` is as in `restore_model`."""
    manager, step = _open(path)
    with manager:
        return _read_meta(manager, step)


# Finding a step ------------------------------------------------------------------------------------------------------


def _absolute(path: str | epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else epath.Path(path.absolute())


def _manager(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, text = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("state", ocp.args.PyTreeRestore, state)
    for item in ("data", "meta"):
        registry.add(item, ocp.args.JsonSave, text)
        registry.add(item, ocp.args.JsonRestore, text)
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options), handler_registry=registry)


def _open(path: str | epath.PathLike) -> tuple[ocp.CheckpointManager, int]:
    """A manager to read with, and the step that a path to a run's checkpoints, or to one of them, stands for."""
    directory = _absolute(path)
    step = None
    if directory.name.isdigit() and (directory / "state").exists():
        step, directory = int(directory.name), directory.parent
    if not directory.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint directory")
    manager = _manager(directory, create=False)
    return manager, _existing(manager, step)


def _existing(manager: ocp.CheckpointManager, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"{manager.directory} holds no complete checkpoint; check the path")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"{manager.directory} has no step {step}; it has {', '.join(map(str, steps))}")
    return step


def _damaged(manager: ocp.CheckpointManager, step: int, what: str) -> CheckpointError:
    source, others = _source(manager, step), sorted(other for other in manager.all_steps() if other != step)
    remedy = "there is none beside it: start from a copy, or anew"
    if others:
        remedy = f"{', '.join(map(str, others))}; to resume from step {others[-1]}, remove {source}"
    return CheckpointError(f"{source}: {what}; use another step: {remedy}")


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).partition("[")[0].strip()[:300]  # TensorStore's go on with how to open it


def _source(manager: ocp.CheckpointManager, step: int) -> str:
    return str(epath.Path(manager.directory) / str(step))


# Reading -------------------------------------------------------------------------------------------------------------


def _restore(
    manager: ocp.CheckpointManager, state_like: State, step: int | None
) -> tuple[State, dict[str, Any], dict[str, Any]]:
    step = _existing(manager, step)
    source = _source(manager, step)
    meta = _read_meta(manager, step)
    wanted = _named_arrays(state_like)
    _check_same(_stored(manager, step), wanted, source, types=True)
    data_state = _read_json(manager, step, "data")
    if meta.get("data") not in (None, _digest(data_state)):
        raise _damaged(manager, step, "'data', the data position, is not what was saved")
    return _filled(state_like, _read(manager, step, wanted, meta)), data_state, meta


def _read_json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    path = epath.Path(manager.directory) / str(step) / item / "metadata"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise _damaged(manager, step, f"{path} is not a regular file")
    try:
        fields = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
    except Exception as error:  # Orbax raises bare ones
        raise _damaged(manager, step, f"{item!r} is missing or damaged") from error
    if not isinstance(fields, dict):
        raise _damaged(manager, step, f"{item!r} is damaged")
    return fields


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = _read_json(manager, step, "meta")
    source = _source(manager, step)
    if meta.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{source} has format {meta.get('format')!r}, this version of stepjax reads {FORMAT}; "
            f"use the version that wrote it: {meta.get('versions')}"
        )
    if meta["format"] == 1:
        _log.warning("%s has no digests, for an older version wrote it: it is not checked for damage", source)
    elif sealed(meta)["digest"] != meta.get("digest"):
        raise _damaged(manager, step, "'meta' is not what was saved")
    if meta.get("step") != step:
        raise _damaged(manager, step, f"it holds step {meta.get('step')!r}, and was renamed or copied to {step}")
    return meta


def _stored(manager: ocp.CheckpointManager, step: int) -> Arrays:
    """Shapes and types of the stored arrays by name."""
    try:
        metadata = manager.item_metadata(step)["state"].tree
        stored = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in metadata.items()}
        chunks = {name: array.storage and array.storage.chunk_shape for name, array in metadata.items()}
    except Exception as error:
        raise _damaged(manager, step, f"'state' is missing or damaged ({_reason(error)})") from error
    for name, chunk in chunks.items():
        if not is_sane_chunk(chunk or (), stored[name].shape):
            raise _damaged(manager, step, f"{name} of shape {stored[name].shape} is stored in chunks of {chunk}")
    return stored


def is_sane_chunk(chunk: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether chunks are within their array: memory for a whole one is taken before it is read."""
    return all(0 < part <= max(size, 1) for part, size in zip(chunk, shape, strict=False))


def _read(manager: ocp.CheckpointManager, step: int, wanted: Arrays, meta: Mapping[str, Any]) -> list[jax.Array]:
    """The wanted arrays in order, each on its sharding; the stored ones that are not wanted stay on disk."""
    arguments = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        arrays = manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
    except jax.errors.JaxRuntimeError:
        raise  # such as too little memory
    except Exception as error:  # Orbax raises bare ones
        sys.unraisablehook = functools.partial(_without_orbax, sys.unraisablehook)
        raise _damaged(manager, step, f"an array is missing or damaged ({_reason(error)})") from error
    if meta["format"] > 1:
        found = digests({name: arrays[name] for name in wanted})
        changed = [name for name in wanted if found[name] != meta["arrays"].get(name)]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise _damaged(manager, step, f"{', '.join(changed[:5])}{more}: the values are not those that were saved")
    return [arrays[name] for name in wanted]


def _without_orbax(tell: Callable[[Any], Any], what: Any) -> None:
    """When one of its readers fails, Orbax leaves the others behind, and Python would tell of each at length."""
    code = getattr(what.object, "cr_code", None)
    if "orbax" not in str(code) and "Event loop is closed" not in str(what.exc_value):
        tell(what)


def _groups(arrays: Arrays) -> list[list[str]]:
    """Names in groups of at most the largest array's size, from large to small."""
    sizes = {name: math.prod(array.shape) * array.dtype.itemsize for name, array in arrays.items()}
    groups: list[list[str]] = []
    left = 0
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if not groups or sizes[name] > left:
            groups.append([])
            left = max(sizes.values())
        groups[-1].append(name)
        left -= sizes[name]
    return groups


def _placed(array: jax.ShapeDtypeStruct, layout: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout)


def _cast(types: Mapping[str, Any], layouts: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    return jax.jit(lambda arrays: {name: x.astype(types[name]) for name, x in arrays.items()}, out_shardings=layouts)


def _check_same(stored: Arrays, wanted: Arrays, source: str, *, types: bool) -> None:
    def show(array: Any) -> str:
        return f"{array.dtype.name}{list(array.shape)}"

    problems = [f"  missing: {name} {show(wanted[name])}" for name in wanted if name not in stored]
    problems += [f"  unexpected: {name} {show(stored[name])}" for name in stored if name not in wanted]
    for name in wanted:
        if name not in stored:
            continue
        differs = stored[name].shape != wanted[name].shape or types and stored[name].dtype != wanted[name].dtype
        if differs:
            problems.append(f"  different: {name} is {show(stored[name])}, wanted {show(wanted[name])}")
    if problems:
        listed = "\n".join(problems)
        raise CheckpointError(
            f"{source} does not fit this configuration:\n{listed}\n"
            "Use the configuration it was saved with (meta/ holds it), or start a run of another name."
        )


# Trees ---------------------------------------------------------------------------------------------------------------


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


def _filled(tree: State, arrays: list[jax.Array]) -> State:
    """`tree` with its arrays replaced, in order."""
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


# Metadata ------------------------------------------------------------------------------------------------------------


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with a digest of all the rest of it."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return rest | {"digest": _digest(rest)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, sort_keys=True)
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
