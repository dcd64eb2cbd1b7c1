"""Checkpoints: the whole train state, the data position and the configuration, saved together by Orbax.

On disk, one directory per run:

    200/state/   the train state as a flat dict from name to array: "step", "model/decoder/embed", "opt_state/1/mu/..."
    200/data/    JSON: the position of the data iterator
    200/meta/    JSON: format, step, configuration, package versions, digests of all the data

Orbax writes a checkpoint to a temporary directory and renames it when complete. A run killed at any instant therefore
leaves the previous checkpoint intact and never a partial one that looks complete. Random keys are not stored: they
derive from the seed and the step.

Reading verifies digests: flipped bits, files missing after an interrupted copy, and renamed directories are errors.
Array digests cover the values (`stepjax.training.digests`) and are taken on the devices before the save begins, so they
hold for any storage and any sharding, and for single arrays.
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

FORMAT = 2  # format 1 had no digests and can still be read
MODEL = "model/"  # prefix of the model's array names
PACKAGES = ("stepjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

State = TypeVar("State")
Arrays = dict[str, Any]

_log = logging.getLogger("stepjax.checkpoint")


class Checkpointer:
    """Saves and restores a run's checkpoints and keeps the last `keep`. Use one per run, and close it.

    `directory` may be local or in a bucket ("gs://..."). `config`, a dataclass or plain data, is stored with every
    checkpoint. Opening a directory removes the remains of killed saves, so only its trainer may do that during a run;
    other readers use `restore_model` and `read_meta`.
    """

    def __init__(self, directory: str | epath.PathLike, *, keep: int, config: Any = None):
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep={keep!r}: must be at least 1")
        self.directory = _absolute(directory)
        self._config = json.loads(_json(config, "config"))
        self._manager = _manager(
            self.directory, preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )

    def save(
        self, step: int, state: Any, data_state: Mapping[str, Any], *, about: Mapping[str, Any] = {}, wait: bool = False
    ) -> bool:
        """Saves in the background; returns once the arrays are copied and may be donated or deleted.

        First waits for any save in progress and raises its error. Returns False if the step is already saved. Every
        process calls this with the same `data_state`, that of the whole global batch. `about` joins the metadata.

        Raises:
            CheckpointError: a later step is saved and would shadow this one on resume, or `data_state` would not
                survive JSON (use strings as keys, lists for tuples).
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        if (latest := self._manager.latest_step()) is not None and step < latest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.directory}: a resume would use the later step {latest} saved "
                f"there; remove the later checkpoints, or rename the run"
            )
        data_copy = json.loads(_json(data_state, "data_state"))  # a copy, because it is written in the background
        if data_copy != data_state:
            raise CheckpointError("JSON would change data_state: use strings as keys, and lists for tuples")
        data_digest = _digest(data_copy)
        multihost_utils.assert_equal(np.uint32(int(data_digest[:8], 16)), "data_state differs between processes")
        arrays = _named_arrays(state)
        meta = {**about, "format": FORMAT, "step": step, "config": self._config, "versions": _versions()}
        meta = sealed(meta | {"data": data_digest, "arrays": digests(arrays)})
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
        """The last complete step, or None."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, state_like: State, step: int | None = None) -> tuple[State, dict[str, Any], dict[str, Any]]:
        """The train state of `step` (the latest by default), the data position, and the metadata.

        `state_like` holds arrays or `jax.ShapeDtypeStruct`s that give the structure, shapes, types and shardings. Every
        array is read directly onto its sharding, which may differ from the saved one. Leaves without a sharding go to
        the first local device.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or its names, shapes or types differ from
                `state_like`; lists all differences.
        """
        self.wait()
        saved = _Saved(self._manager, step)
        wanted = _named_arrays(state_like)
        saved.check_holds(wanted, saved.shapes, types=True)
        data_state = saved.json("data")
        if saved.meta.get("data") not in (None, _digest(data_state)):
            raise saved.damaged("'data', the data position, has changed since it was saved")
        state = jax.tree.unflatten(jax.tree.structure(state_like), saved.read(wanted))
        return state, data_state, saved.meta

    def wait(self) -> None:
        """Blocks until any save in progress is complete; raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restore_model(path: str | epath.PathLike, model_like: State) -> State:
    """The model of a checkpoint; the rest of the state is not read.

    `path` is a run's checkpoint directory (for its latest step) or one step in it. `model_like` is as in
    `Checkpointer.restore`, but its types may differ from the stored ones: arrays are cast when read.
    Raises CheckpointError likewise.
    """
    wanted = _named_arrays(model_like)
    arrays = restore_parameters(path, wanted, all_of_them=True)
    return jax.tree.unflatten(jax.tree.structure(model_like), list(arrays.values()))


def restore_parameters(path: str | epath.PathLike, wanted: Arrays, *, all_of_them: bool = False) -> Arrays:
    """Selected parameters of a model by name, each cast and placed on its sharding; the others are not read.

    Raises CheckpointError like `restore_model`; stored parameters not in `wanted` are an error only if `all_of_them`.
    """
    with _opened(path) as saved:
        named = {MODEL + name: array for name, array in wanted.items()}
        stored = {name: array for name, array in saved.shapes.items() if name.startswith(MODEL)}
        if not all_of_them:
            stored = {name: array for name, array in stored.items() if name in named}
        saved.check_holds(named, stored, types=False)
        # Digests are of the stored types. Arrays to cast are read in groups no larger than the largest array.
        casts = {name: stored[name] for name in named if stored[name].dtype != named[name].dtype}
        arrays: Arrays = {}
        for names in filter(None, [[name for name in named if name not in casts], *_groups(casts)]):
            layouts = {name: named[name].sharding for name in names}
            like = {n: jax.ShapeDtypeStruct(stored[n].shape, stored[n].dtype, sharding=layouts[n]) for n in names}
            found = dict(zip(names, saved.read(like), strict=True))
            arrays |= _cast({name: named[name].dtype for name in names}, layouts)(found) if names[0] in casts else found
        return {name: arrays[MODEL + name] for name in wanted}


def stored_parameters(path: str | epath.PathLike) -> tuple[str, Arrays]:
    """The path of the step that `path` resolves to, and its parameters' shapes and types by name."""
    with _opened(path) as saved:
        arrays = {n.removeprefix(MODEL): array for n, array in saved.shapes.items() if n.startswith(MODEL)}
        return saved.path, arrays


def read_meta(path: str | epath.PathLike) -> dict[str, Any]:
    """The metadata of a checkpoint: "step", "config", "versions" and others. `path` is as in `restore_model`."""
    with _opened(path) as saved:
        return saved.meta


# Reading -------------------------------------------------------------------------------------------------------------


class _Saved:
    """A complete saved step."""

    def __init__(self, manager: ocp.CheckpointManager, step: int | None = None):
        """`step` is the latest by default."""
        steps = sorted(manager.all_steps())
        if not steps:
            raise CheckpointError(f"no complete checkpoint in {manager.directory}; check the path")
        if step is not None and step not in steps:
            raise CheckpointError(f"{manager.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        self._manager, self._step = manager, steps[-1] if step is None else step
        self._others = [other for other in steps if other != self._step]
        self.path = str(epath.Path(manager.directory) / str(self._step))
        self.meta = self._checked_meta()

    def damaged(self, what: str) -> CheckpointError:
        remedy = "there is no other, so start from a copy or begin a new run"
        if self._others:
            remedy = f"{', '.join(map(str, self._others))}; to resume from step {self._others[-1]}, remove {self.path}"
        return CheckpointError(f"{self.path}: {what}; use another step: {remedy}")

    def json(self, item: str) -> dict[str, Any]:
        path = epath.Path(self.path) / item / "metadata"
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise self.damaged(f"{path} is not a regular file")
        try:
            fields = self._manager.restore(self._step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        except Exception as error:  # Orbax raises bare Exceptions
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
            _log.warning("%s was written by an older version without digests; not checked for damage", self.path)
        elif sealed(meta)["digest"] != meta.get("digest"):
            raise self.damaged("'meta' has changed since it was saved")
        if meta.get("step") != self._step:
            raise self.damaged(f"contains step {meta.get('step')!r}, but was renamed or copied to {self._step}")
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
                + "\nUse the configuration it was saved with (in meta/), or start a run with another name."
            )

    def read(self, wanted: Arrays) -> list[jax.Array]:
        """The wanted arrays in order, each on its sharding and checked against its digest; others are not read."""
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        try:
            arrays = self._manager.restore(self._step, args=ocp.args.Composite(state=arguments))["state"]
        except jax.errors.JaxRuntimeError:
            raise  # such as out of memory
        except Exception as error:  # Orbax raises bare Exceptions
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
    """The step that `path` resolves to: one step, or the latest of a run's checkpoints."""
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
    """Whether chunks are no larger than their array: reading first allocates memory for a whole chunk."""
    return all(0 < part <= max(size, 1) for part, size in zip(chunk, shape, strict=False))


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).partition("[")[0].strip()[:300]  # TensorStore appends its whole spec


def _without_orbax(report: Callable[[Any], Any], what: Any) -> None:
    """Mutes Python's long reports on the readers that Orbax abandons after one fails."""
    code = getattr(what.object, "cr_code", None)
    if "orbax" not in str(code) and "Event loop is closed" not in str(what.exc_value):
        report(what)


def _groups(arrays: Arrays) -> list[list[str]]:
    """Names from large to small, in groups no larger than the largest array."""
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
    """The arrays of a pytree by parameter name; abstract arrays get a sharding if they have none."""
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
    """The metadata with a digest of its other fields."""
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
            continue  # such as stepjax itself, run from a checkout
    return versions
