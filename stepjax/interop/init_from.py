"""Initialises a new run, part by part, from published weights, a converted checkpoint or another run.

    source                                                                  fills
    a Hugging Face directory of STEP3-VL                                    vision, projector, decoder
    a Hugging Face directory of a Qwen3 or Llama text model                 decoder
    a Perception Encoder in timm's safetensors layout, or its directory     vision
    a converted checkpoint; a run, its checkpoint directory, or one step    its own parts

`plan_start` reads only headers and reports every mismatch. `initial_model` then shards one parameter at a time straight
from the source: no host holds the whole model, and no device holds a parameter twice (except the few that are resized
or extended). Parameters without a source get the same values as in a run without sources and with the same seed.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepjax.config import ModelConfig, RunConfig, VisionConfig
from stepjax.errors import CheckpointError
from stepjax.interop.bounds import read_json
from stepjax.interop.hf_directory import CONFIG, HFDirectory
from stepjax.interop.hf_layout import Tensor, disk_key, step_vl_tensors, timm_tensors
from stepjax.interop.hf_match import Abstract, Shaped, abstract_parameters, match, places, read_parameters
from stepjax.interop.model_spec import ModelSpec
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.interop.safetensors_file import check_size, parse_header, read_header, read_tensor
from stepjax.models.step_vl import StepVL, abstract_model, init_model, make_model
from stepjax.training.checkpoint import restore_parameters

Shapes = dict[str, tuple[int, ...]]

POSITIONS = "vision/positions"
ROWS = {"decoder/embedding": 0, "decoder/head_kernel": 1}  # dimension indexed by token id
_TIMM_KEY = "patch_embed.proj.weight"
# Differences that tensor shapes may not reveal.
_UNSEEN = ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "tie_embeddings")
# Not reported: initial values, and sizes already checked by the shapes of the tensors (resized or extended).
_UNTOLD = ("layer_scale_init", "position_grid", "vocab_size", "width", "num_layers", "mlp_dim", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source: headers are read, weights are not."""

    path: str
    kind: str
    stored: Mapping[str, Mapping[str, Shaped]]  # tensors by part and key
    tensors: Callable[[ModelConfig], Iterable[Tensor]]  # source tensors for a model's parameters
    read: Callable[[Abstract, list[Tensor], Mapping[str, Shaped]], dict[str, jax.Array]]
    configs: Mapping[str, Any]  # by part: VisionConfig, DecoderConfig, or None for the projector
    pixels: Mapping[str, Any]  # `mean` and `std` of the images, if known


@dataclasses.dataclass(frozen=True)
class PartStart:
    """How a part of the model starts.

    Attributes:
        path: the path in `init_from`.
        shapes: shape of every parameter in the model.
        stored: shape in the source of every parameter it fills; the others start from random values.
        tensors: the source tensors that fill them.
        notes: settings in which the source differs from the recipe.
    """

    part: str
    path: str | None
    source: Source | None
    shapes: Shapes
    stored: Shapes = dataclasses.field(default_factory=dict)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def new_rows(self) -> dict[str, int]:
        """Number of random rows appended to the source's rows."""
        rows = {
            name: self.shapes[name][dim] - self.stored[name][dim] for name, dim in ROWS.items() if name in self.stored
        }
        return {name: count for name, count in rows.items() if count}

    @property
    def resized(self) -> dict[str, tuple[int, int]]:
        """Sides of the position table in the source and here, if they differ."""
        old, new = self.stored.get(POSITIONS), self.shapes.get(POSITIONS)
        return {} if old is None or new is None or old == new else {POSITIONS: (old[0], new[0])}

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "read": None if self.source is None else self.source.path,
            "kind": None if self.source is None else self.source.kind,
            "loaded": list(self.stored),
            "resized": self.resized,
            "new_rows": self.new_rows,
            "random": [name for name in self.shapes if name not in self.stored],
            "differs": self.notes,
        }


def plan_start(config: RunConfig, *, must_exist: bool = True) -> list[PartStart]:
    """How every part of the model would start; empty if `init_from` names no source. Reads headers, not weights.

    Without `must_exist`, a part whose source does not exist or is a URL gets a path but no source.

    Raises:
        CheckpointError: a source cannot be read, lacks its part, or does not fit; names all mismatched tensors of the
            part, with both shapes.
    """
    if not any(config.init_from.sources.values()):
        return []
    all_shapes = ModelSpec(config.model).shapes()
    opened: dict[str | None, Source | None] = {None: None}
    starts = []
    for part, path in config.init_from.sources.items():
        field = f"init_from.{part if getattr(config.init_from, part) is not None else 'path'}"
        shapes = {name: shape for name, shape in all_shapes.items() if name.startswith(f"{part}/")}
        if path is not None and path not in opened:
            opened[path] = _open(path, field, config.model.vision, must_exist)
        start = PartStart(part, path, opened[path], shapes)
        starts.append(start if start.source is None else _fitted(start, start.source, config, f"{field}={path!r}"))
    if config.model.tofc is not None:
        shapes = {name: shape for name, shape in all_shapes.items() if name.startswith("tofc/")}
        source = opened.get(config.init_from.path)
        if source is None or "tofc" not in source.stored:
            starts.append(PartStart("tofc", None, None, shapes))
        else:
            start = PartStart("tofc", config.init_from.path, source, shapes)
            starts.append(_fitted(start, source, config, f"init_from.path={config.init_from.path!r}"))
    return starts


def describe(starts: list[PartStart], config: RunConfig) -> list[str]:
    """One line per part, and one per difference between a source and the recipe."""
    lines = []
    for start in starts:
        if start.source is None:
            what = "random values" if start.path is None else f"from {start.path}, which was not found and not checked"
            lines.append(f"{start.part:<10} {what}")
            continue
        values = sum(map(math.prod, start.stored.values()))
        line = f"{start.part:<10} from {start.source.path} ({start.source.kind}): {values:,} values"
        for name, (old, new) in start.resized.items():
            method = config.init_from.resize + (", antialiased" if config.init_from.resize_antialias else "")
            line += f"; {name} resized from {old} x {old} to {new} x {new} ({method})"
        for name, rows in start.new_rows.items():
            line += f"; {rows:,} new rows of {name} random"
        lines += [line, *(f"{'':<10} differs: {note}" for note in start.notes)]
    return lines


def initial_model(config: RunConfig, mesh: Mesh) -> tuple[StepVL, list[PartStart]]:
    """The initial model of a new run, and the start of each part (empty if `init_from` names no source).

    Raises:
        CheckpointError: as `plan_start`, or a source's weights are damaged.
        ConfigError: the mesh does not divide a parameter.
    """
    starts = plan_start(config)
    if not starts:
        return init_model(config.model, config.numerics, seed=config.seed, mesh=mesh), []
    abstract = abstract_model(config.model, config.numerics)
    targets = abstract_parameters(abstract, mesh)
    values = _random_values(config, targets, {name: shape for start in starts for name, shape in start.stored.items()})
    for start in starts:
        if start.source is not None:
            wanted = {name: _stored_like(targets[name], shape) for name, shape in start.stored.items()}
            read = start.source.read(wanted, start.tensors, start.source.stored[start.part])
            for name in wanted:
                values[name] = _adapted(name, read.pop(name), targets[name], values.pop(name, None), config)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in targets]), starts


# Fitting -------------------------------------------------------------------------------------------------------------


def _fitted(start: PartStart, source: Source, config: RunConfig, place: str) -> PartStart:
    part = start.part
    if part not in source.stored:
        raise CheckpointError(
            f"{place}: {source.path} ({source.kind}) has no weights for {part}, only for {', '.join(source.stored)}; "
            f"name another source, or None to start from random values"
        )
    model, stored = config.model, dict(start.shapes)
    made: Any = source.configs.get(part)
    if part == "vision":
        grid = made.position_grid
        stored[POSITIONS] = (grid, grid, model.vision.width)
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, position_grid=grid))
    more = part == "decoder" and made.vocab_size < model.decoder.vocab_size
    if more and config.init_from.new_embedding_rows:
        for name, dim in ROWS.items():
            if name in stored:
                stored[name] = (*stored[name][:dim], made.vocab_size, *stored[name][dim + 1 :])
    tensors = [tensor for tensor in source.tensors(model) if tensor.name in stored]
    try:
        match(places(tensors, stored), source.stored[part])
    except CheckpointError as error:
        remedy = "; init_from.new_embedding_rows lets the new ids start from random embeddings" if more else ""
        raise CheckpointError(f"{place}: {error}{remedy}") from error
    notes = []
    ours = getattr(config.model, part, None)
    changed = {} if made is None else {n: value for n, value in vars(made).items() if value != getattr(ours, n)}
    for name, value in changed.items():
        if name in _UNSEEN:
            raise CheckpointError(
                f"{place}: its {part}.{name} is {value!r}, the recipe's {getattr(ours, name)!r}: set "
                f"model.{part}.{name} to that"
            )
        if name not in _UNTOLD:
            notes.append(f"model.{part}.{name} is {getattr(ours, name)!r}, {value!r} in the source")
    if part == "vision":
        notes += [
            f"images.{name} is {getattr(config.images, name)}, {value} in the source"
            for name, value in source.pixels.items()
            if value != getattr(config.images, name)
        ]
    return dataclasses.replace(start, stored=stored, tensors=tensors, notes=notes)


def _stored_like(target: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The target with a source's shape. Dimensions that will change are not sharded: the mesh may not divide them."""
    assert isinstance(target.sharding, NamedSharding)
    axes = [
        axis if old == new else None for axis, old, new in zip(target.sharding.spec, shape, target.shape, strict=True)
    ]
    return jax.ShapeDtypeStruct(shape, target.dtype, sharding=NamedSharding(target.sharding.mesh, PartitionSpec(*axes)))


def _random_values(config: RunConfig, targets: Abstract, stored: Shapes) -> dict[str, jax.Array]:
    """Random values for the parameters and rows that no source fills; computes nothing else."""
    rows = {name: ROWS[name] for name in ROWS if name in stored and stored[name] != targets[name].shape}
    layouts = {
        name: _stored_like(target, stored[name]).sharding if name in rows else target.sharding
        for name, target in targets.items()
        if name in rows or name not in stored
    }
    if not layouts:
        return {}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        model = make_model(config.model, config.numerics, key)
        values = dict(zip(targets, jax.tree.leaves(model), strict=True))
        for name, dim in rows.items():
            values[name] = jax.lax.slice_in_dim(values[name], stored[name][dim], None, axis=dim)
        return {name: values[name] for name in layouts}

    return jax.jit(make, out_shardings=layouts)(jax.random.key(config.seed))


def _adapted(
    name: str, value: jax.Array, target: jax.ShapeDtypeStruct, rows: jax.Array | None, config: RunConfig
) -> jax.Array:
    if value.shape == target.shape:
        return value
    if rows is not None:
        extend = jax.jit(lambda x, y: jnp.concatenate([x, y], axis=ROWS[name]), out_shardings=target.sharding)
        return extend(value, rows)
    method, antialias = config.init_from.resize, config.init_from.resize_antialias

    def resize(table: jax.Array) -> jax.Array:
        resized = jax.image.resize(table.astype(jnp.float32), target.shape, method, antialias=antialias)
        return resized.astype(target.dtype)

    return jax.jit(resize, out_shardings=target.sharding)(value)


# Opening -------------------------------------------------------------------------------------------------------------


def _open(path: str, field: str, vision: VisionConfig, must_exist: bool) -> Source | None:
    local, is_url = Path(path).expanduser(), "://" in path
    if not must_exist and (is_url or not local.exists()):
        return None
    if not is_url and not local.exists():
        raise CheckpointError(
            f"{field}={path!r}: no such file or directory; pass --{field.replace('_', '-')} PATH, or None to "
            f"start from random values"
        )
    try:
        file = _timm_file(local)
        if file is not None:
            return _open_timm(file, vision)
        if (local / CONFIG).exists():
            return _open_hf(HFDirectory(local))
        return _open_checkpoint(OrbaxDirectory(path))
    except CheckpointError as error:
        raise CheckpointError(f"{field}={path!r}: {error}") from error


def _timm_file(path: Path) -> Path | None:
    """The file of a timm model: the path itself, its model.safetensors, or the one safetensors file in it."""
    if path.is_file():
        return path
    files = [file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith(".")]
    whole = path / "model.safetensors"
    file = whole if whole in files else files[0] if len(files) == 1 else None
    return file if file is not None and _TIMM_KEY in parse_header(file, read_header(file)) else None


def _open_timm(file: Path, vision: VisionConfig) -> Source:
    """timm's Perception Encoder has our encoder's tensors under other names, and the same rotary convention.

    Its MLP uses exact GELU. On grids other than the pretrained one, timm rescales rotary positions; the report's model
    does not.
    """
    entries = parse_header(file, read_header(file))
    check_size(file, entries)
    shape = entries["pos_embed"].shape if "pos_embed" in entries else ()
    grid = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if len(shape) != 3 or grid * grid != shape[1] or _TIMM_KEY not in entries:
        raise CheckpointError(
            f"{file} is not a Perception Encoder without class token in timm's layout: pos_embed has shape {shape}"
        )
    fields = read_json(file.with_name(CONFIG)) if file.with_name(CONFIG).exists() else {}
    known: dict[str, Any] = {"num_heads": 16} if str(fields.get("architecture", "")).startswith("vit_pe_lang") else {}
    for name in ("model_args", "pretrained_cfg"):
        known |= fields[name] if isinstance(fields.get(name), dict) else {}
    pixels = {name: tuple(known[name]) for name in ("mean", "std") if isinstance(known.get(name), list)}
    made = dataclasses.replace(vision, position_grid=grid, activation="gelu", norm_eps=1e-5, rope_theta=1e4)
    # Not `replace`: it would reject heads that do not divide the recipe's width, without naming the source.
    configs = {"vision": types.SimpleNamespace(**vars(made) | {"num_heads": known.get("num_heads", vision.num_heads)})}
    return Source(
        path=str(file),
        kind="timm",
        stored={"vision": entries},
        tensors=lambda model: timm_tensors(model.vision),
        read=_reader(lambda key: read_tensor(key, entries[key])),
        configs=configs,
        pixels=pixels,
    )


def _open_hf(directory: HFDirectory) -> Source:
    def part_of(key: str) -> str:
        if directory.spec.is_text or not key.startswith(("vision_model.", "vit_large_projector.")):
            return "decoder"
        return "projector" if key.startswith(("vision_model.vit_", "vit_")) else "vision"

    stored: dict[str, dict[str, Shaped]] = {}
    for key, entry in directory.entries.items():
        stored.setdefault(part_of(disk_key(key)), {})[key] = entry
    return Source(
        path=str(directory.path),
        kind="Hugging Face",
        stored=stored,
        tensors=step_vl_tensors,
        read=_reader(directory.read),
        **_facts(directory.spec),
    )


def _open_checkpoint(source: OrbaxDirectory) -> Source:
    if source.run is not None and source.run.adapters is not None:
        raise CheckpointError(
            f"{source.step} holds only adapters: merge them with `stepjax convert {source.path} DIR`, and name DIR here"
        )
    prefix = "decoder/" if source.spec.is_text else ""  # a text model's names have no prefix
    stored: dict[str, dict[str, Shaped]] = {}
    for name, array in source.parameters.items():
        stored.setdefault(f"{prefix}{name}".split("/")[0], {})[f"{prefix}{name}"] = array

    def read(wanted: Abstract, tensors: list[Tensor], stored: Mapping[str, Shaped]) -> dict[str, jax.Array]:
        found = restore_parameters(source.step, {name.removeprefix(prefix): leaf for name, leaf in wanted.items()})
        return {f"{prefix}{name}": array for name, array in found.items()}

    return Source(
        path=str(source.step),
        kind="converted checkpoint" if source.run is None else "run",
        stored=stored,
        tensors=lambda model: [Tensor(name, name) for name in ModelSpec(model).shapes()],  # stored under our own names
        read=read,
        **_facts(source.spec),
    )


def _reader(read: Callable[[str], np.ndarray]) -> Callable[..., dict[str, jax.Array]]:
    """Reads public tensors into parameters."""
    return lambda wanted, tensors, stored: read_parameters(wanted, tensors, read, stored)


def _facts(spec: ModelSpec) -> dict[str, Any]:
    """The fields `configs` and `pixels` of a source."""
    if isinstance(spec.model, ModelConfig) and spec.images is not None:
        configs = {"vision": spec.model.vision, "projector": None, "decoder": spec.model.decoder}
        return {"configs": configs, "pixels": {"mean": spec.images.mean, "std": spec.images.std}}
    return {"configs": {"decoder": spec.decoder}, "pixels": {}}
