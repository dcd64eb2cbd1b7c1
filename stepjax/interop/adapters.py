"""Runs that train adapters: their base model, which they do not save, and the two together.

A checkpoint of such a run holds the adapters, and in its metadata the digest of every parameter of the base. The base
is read from the run's `init_from` again, and an adapter is never added to another model than its own.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stepjax.config import LoraConfig, MeshConfig, NumericsConfig, RunConfig
from stepjax.config_file import to_json
from stepjax.errors import CheckpointError
from stepjax.interop.init_from import initial_model
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models import lora
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.sharding import make_mesh, named_leaves, shardings
from stepjax.training.checkpoint import Checkpointer, restore_model
from stepjax.training.digests import digests

BASE = "base"  # the key in a checkpoint's metadata
MERGED = ".merged"  # suffix of a conversion's scratch directory


def base_digests(base: StepVL) -> dict[str, dict[str, int]]:
    """What a checkpoint's metadata says of the base."""
    return {BASE: digests({name: jax.tree.leaves(leaf)[0] for name, leaf in named_leaves(base).items()})}


def check_base(base: StepVL, config: RunConfig, meta: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The base's digests, which must be those in a checkpoint's metadata.

    Raises:
        CheckpointError: some differ; names them.
    """
    found, saved = base_digests(base), meta.get(BASE, {})
    changed = [name for name, digest in found[BASE].items() if saved.get(name) != digest]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        sources = ", ".join(sorted(set(filter(None, config.init_from.sources.values()))))
        raise CheckpointError(
            f"init_from: {sources} is not the model that these adapters were trained on: put that model there, or "
            f"begin a new run ({', '.join(changed[:5])}{more} differ)"
        )
    return found


def load_merged(source: OrbaxDirectory, *, numerics: NumericsConfig | None = None, mesh: Mesh | None = None) -> StepVL:
    """The model of a run with adapters: its base with the adapters added. Arguments are as in `load`.

    Raises:
        CheckpointError: the base is missing or another model, or the checkpoint is unusable.
    """
    config = source.run
    assert config is not None and config.adapters is not None
    adapters_config: LoraConfig = config.adapters
    on_mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    try:
        base, _ = initial_model(config, on_mesh)
    except CheckpointError as error:
        raise CheckpointError(f"{source.step} holds adapters and needs the model that they adapt; {error}") from error
    check_base(base, config, source.meta)
    adapters_like = jax.eval_shape(partial(lora.init_adapters, adapters_config, seed=0), base)
    placed = jax.tree.map(_placed, adapters_like, shardings(adapters_like, on_mesh))
    model = lora.merged(adapters_config, base, restore_model(source.step, placed))
    like = abstract_model(config.model, numerics or config.numerics)
    layout = jax.devices()[0] if mesh is None else shardings(like, mesh)
    model = jax.tree.map(lambda x, to: x.astype(to.dtype), jax.tree.leaves(model), jax.tree.leaves(like))
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(like), model), layout)


def _placed(array: jax.ShapeDtypeStruct, layout: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout)


@contextlib.contextmanager
def merged_run(source: OrbaxDirectory, scratch: Path) -> Iterator[OrbaxDirectory]:
    """A run with adapters as one of a whole model, in a directory that exists until the block ends.

    Raises:
        CheckpointError: as `load_merged`, or `scratch` exists.
    """
    config = source.run
    assert config is not None
    fields = to_json(config)
    fields["lora"]["rank"] = 0
    try:
        scratch.mkdir()
    except FileExistsError as error:
        raise CheckpointError(f"{scratch} is in the way: remove it") from error
    try:
        with Checkpointer(scratch, keep=1, config=fields) as checkpointer:
            checkpointer.save(source.meta["step"], {"model": load_merged(source)}, {}, wait=True)
        yield OrbaxDirectory(scratch)
    finally:
        shutil.rmtree(scratch)
