"""`stepjax.load`: loads a model and its processor from a local directory, or from a run in an object store."""

from pathlib import Path

import jax

from stepjax.config import NumericsConfig, RunConfig, TokenizerConfig
from stepjax.errors import CheckpointError
from stepjax.interop.adapters import load_merged
from stepjax.interop.bounds import read_json
from stepjax.interop.hf_config import STARTS_THINKING
from stepjax.interop.hf_directory import CONFIG, HFDirectory
from stepjax.interop.hf_match import abstract_parameters, fill
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.interop.text_processor import TOKENIZER, TextProcessor
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL
from stepjax.processing.processor import Processor
from stepjax.training.checkpoint import restore_model


def load(
    path: str | Path, *, numerics: NumericsConfig | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[StepVL | Qwen3, Processor | TextProcessor]:
    """Loads the model in a directory and the processor for its inputs.

    Args:
        path: a Hugging Face directory (STEP3-VL, or a plain Qwen3 or Llama text model), a converted checkpoint, a
            training run, its checkpoint directory, or one step of it. A run may be a URL ("gs://...").
        numerics: parameter and compute dtypes; by default the run's, or `NumericsConfig`'s. Parameters are cast as they
            are read.
        mesh: shard parameters over it (see `stepjax.sharding`); by default they go to the first device.

    Returns:
        `StepVL` and a `Processor`; for text models, the decoder `Qwen3` and a `TextProcessor`.

    Raises:
        CheckpointError: there is no usable checkpoint; names what is missing or does not fit.
        TokenError: the checkpoint's tokenizer cannot be used.
    """
    if "://" in str(path):
        model, processor, _ = load_run(path, numerics=numerics, mesh=mesh)
        return model, processor
    source = open_checkpoint(path)
    return load_model(source, numerics=numerics, mesh=mesh), load_processor(source)


def load_run(
    path: str | Path, *, numerics: NumericsConfig | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[StepVL, Processor, RunConfig]:
    """Loads the model, processor and configuration of a training run.

    Args:
        path: the run, its checkpoint directory, or one step of it; local, or the URL of an object store.
        numerics, mesh: as in `load`.

    Raises:
        CheckpointError: the run has no usable checkpoint.
        TokenError: the run's tokenizer cannot be used.
    """
    source = OrbaxDirectory(path)
    if source.run is None:
        raise CheckpointError(f"{path} is a converted checkpoint, not a run: copy it here, and load the copy")
    model, processor = load_model(source, numerics=numerics, mesh=mesh), load_processor(source)
    assert isinstance(model, StepVL) and isinstance(processor, Processor)
    return model, processor, source.run


def open_checkpoint(path: str | Path) -> HFDirectory | OrbaxDirectory:
    """Raises CheckpointError if the directory is not loadable."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    if (directory / CONFIG).exists():
        return HFDirectory(directory)
    if any(any(directory.glob(pattern)) for pattern in ("checkpoints", "state", "[0-9]*/state")):
        return OrbaxDirectory(directory)
    raise CheckpointError(
        f"{path} is neither a Hugging Face directory (no {CONFIG}) nor a checkpoint of Orbax or a run (no STEP/state)"
    )


def load_model(
    source: HFDirectory | OrbaxDirectory,
    *,
    numerics: NumericsConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> StepVL | Qwen3:
    """Loads only the model; see `load`."""
    if isinstance(source, HFDirectory):
        return fill(source.spec.abstract(numerics), source.spec.tensors(), source.read, source.entries, mesh)
    if source.run is not None and source.run.adapters is not None:
        return load_merged(source, numerics=numerics, mesh=mesh)
    abstract = source.spec.abstract(numerics or (source.run.numerics if source.run else None))
    if mesh is not None:
        placed = abstract_parameters(abstract, mesh)
        abstract = jax.tree.unflatten(jax.tree.structure(abstract), placed.values())
    return restore_model(source.step, abstract)


def load_processor(source: HFDirectory | OrbaxDirectory) -> Processor | TextProcessor:
    """Loads only the processor; see `load`."""
    spec = source.spec
    if isinstance(source, OrbaxDirectory) and source.run is not None:
        assert spec.images is not None
        return Processor.from_config(spec.images, source.run.tokenizer)
    directory = source.path if isinstance(source, HFDirectory) else source.side_files
    if directory is None or not (directory / TOKENIZER).exists():
        raise CheckpointError(
            f"{directory or source.path} has no {TOKENIZER}: put the model's there, or load the model alone with "
            "stepjax.interop.load.load_model"
        )
    if spec.images is None:
        processor = TextProcessor.from_directory(directory)
        size = processor.vocab_size
    else:
        starts_thinking = read_json(directory / CONFIG).get(STARTS_THINKING) is not False
        config = TokenizerConfig(path=str(directory), generation_starts_thinking=starts_thinking)
        processor = Processor.from_config(spec.images, config)
        size = processor.tokenizer.vocab_size
    if size > spec.decoder.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER} has {size} ids, but the model only {spec.decoder.vocab_size} embeddings: "
            "they do not belong together"
        )
    return processor
