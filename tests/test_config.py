"""The typed configuration: every value that cannot work is refused by name, and what is derived is right."""

import dataclasses
import re

import pytest
from tiny_recipe import config as tiny

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DigitsSource,
    EvaluationConfig,
    ImageConfig,
    JsonlSource,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    NumericsConfig,
    Phase,
    ScheduleConfig,
    VisionConfig,
)
from stepjax.errors import ConfigError, StepjaxError

PHASE = Phase(tokens=100, start=1e-3, end=1e-4)
SOURCE = DigitsSource(name="a", weight=1.0, task="count")
DOCS = JsonlSource(name="docs", weight=1.0, path="docs.jsonl")

REFUSED = {
    "vision.num_heads=7: must divide width 1536": lambda: VisionConfig(num_heads=7),
    "vision.num_heads=32: width / num_heads must be a multiple of 4": lambda: VisionConfig(width=64, num_heads=32),
    "vision.num_layers=0: must be positive": lambda: VisionConfig(num_layers=0),
    "vision.num_heads=0: must be positive": lambda: VisionConfig(num_heads=0),
    "vision.patch_size=-14: must be positive": lambda: VisionConfig(patch_size=-14),
    "decoder.num_kv_heads=5: must divide num_heads 32": lambda: DecoderConfig(num_kv_heads=5),
    "decoder.num_kv_heads=0: must be positive": lambda: DecoderConfig(num_kv_heads=0),
    "decoder.head_dim=31: must be even": lambda: DecoderConfig(head_dim=31),
    "decoder.vocab_size=0: must be positive": lambda: DecoderConfig(vocab_size=0),
    "numerics.loss_chunk=0: must be positive": lambda: NumericsConfig(loss_chunk=0),
    "images.global_size=100: must be a multiple of patch_size 14": lambda: ImageConfig(global_size=100),
    "images.crop_size=100: must be a multiple of patch_size 14": lambda: ImageConfig(crop_size=100),
    "images.patch_size=0: must be positive": lambda: ImageConfig(patch_size=0),
    "data.sources=['a', 'a']: give every source a unique name": lambda: DataConfig(sources=(SOURCE, SOURCE)),
    "data.sources.a.weight=0: must be positive": lambda: DataConfig(sources=(dataclasses.replace(SOURCE, weight=0),)),
    "data.sources.a.weight=nan: must be positive": lambda: DataConfig(
        sources=(dataclasses.replace(SOURCE, weight=float("nan")),)
    ),
    "data.open_rows=0: must be positive": lambda: DataConfig(open_rows=0),
    "data.prefetch=0: must be positive": lambda: DataConfig(prefetch=0),
    "data.num_workers=-1: must not be negative": lambda: DataConfig(num_workers=-1),
    "batch.rows=0: must be positive": lambda: BatchConfig(rows=0),
    "batch.accumulation=3: must divide rows 4": lambda: BatchConfig(rows=4, accumulation=3),
    "batch.accumulation=0: must be positive": lambda: BatchConfig(rows=4, accumulation=0),
    "batch.crops=-1: must not be negative": lambda: BatchConfig(rows=4, crops=-1),
    "schedule.phases=(): needs at least one phase": lambda: ScheduleConfig(phases=()),
    "schedule.phases.1.tokens=0: must be positive": lambda: ScheduleConfig(
        phases=(PHASE, dataclasses.replace(PHASE, tokens=0))
    ),
    "schedule.phases.0.end=-1e-05: must not be negative": lambda: ScheduleConfig(
        phases=(dataclasses.replace(PHASE, end=-1e-5),)
    ),
    "schedule.warmup_tokens=101: must end within the first phase": lambda: ScheduleConfig(
        phases=(PHASE,), warmup_tokens=101
    ),
    "checkpoint.every=0: must be positive": lambda: CheckpointConfig(every=0),
    "checkpoint.keep=0: must be positive": lambda: CheckpointConfig(keep=0),
    "logging.every=0: must be positive": lambda: LoggingConfig(every=0),
    "logging.profile=(5, 3): must be a first step from 1": lambda: LoggingConfig(profile=(5, 3)),
    "logging.profile=(0, 3): must be a first step from 1": lambda: LoggingConfig(profile=(0, 3)),
    "evaluation.examples=0: must be positive": lambda: EvaluationConfig(examples=0),
    "evaluation.batch_size=0: must be positive": lambda: EvaluationConfig(batch_size=0),
    "evaluation.every=0: must be positive, or None": lambda: EvaluationConfig(every=0),
    "name='': must not be empty": lambda: dataclasses.replace(tiny, name=""),
    "seed=-1: must be from 0 to 4294967295": lambda: dataclasses.replace(tiny, seed=-1),
    "images.patch_size=7: must equal vision.patch_size 14": lambda: dataclasses.replace(
        tiny, images=dataclasses.replace(tiny.images, patch_size=7)
    ),
    "model.vision.position_grid=4: must equal the 8 patches": lambda: dataclasses.replace(
        tiny, images=dataclasses.replace(tiny.images, global_size=112)
    ),
    "mesh=[1, -1, -1, 1, 1]: at most one axis may be -1": lambda: MeshConfig(data=-1).shape(8),
    "mesh=[1, 3, -1, 1, 1]: the axes (slice, data, fsdp, context, tensor) must multiply to the 8 devices": lambda: (
        MeshConfig(data=3).shape(8)
    ),
    "mesh=[1, 2, 2, 1, 1]: the axes (slice, data, fsdp, context, tensor) must multiply to the 8 devices": lambda: (
        MeshConfig(data=2, fsdp=2).shape(8)
    ),
    "mesh=[1, 0, -1, 1, 1]: an axis is positive, or -1": lambda: MeshConfig(data=0).shape(8),
    "mesh=[1, 1, -2, 1, 1]: an axis is positive, or -1": lambda: MeshConfig(fsdp=-2).shape(8),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name_and_value_with_what_to_do(message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        REFUSED[message]()


def test_user_errors_are_value_errors():
    assert issubclass(ConfigError, StepjaxError) and issubclass(StepjaxError, ValueError)


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 1, 8, 1, 1)),
        (MeshConfig(data=2, tensor=2), 8, (1, 2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=4), 8, (1, 2, 4, 1, 1)),
        (MeshConfig(data=2, fsdp=2, context=2), 8, (1, 2, 2, 2, 1)),
        (MeshConfig(fsdp=8, context=-1), 8, (1, 1, 8, 1, 1)),
    ],
)
def test_the_free_mesh_axis_takes_what_the_others_leave(mesh, devices, shape):
    assert mesh.shape(devices) == shape


def test_the_defaults_are_the_public_checkpoints():
    model, images = ModelConfig(), ImageConfig()
    assert model.vision.head_dim == 96
    assert (images.global_grid, images.crop_grid) == (52, 36)
    assert (images.global_tokens, images.crop_tokens) == (169, 81)
    assert model.vision.position_grid == images.global_grid


def test_steps_cover_the_schedule():
    assert tiny.tokens_per_step == 2 * 128
    assert tiny.num_steps == 16
    longer = dataclasses.replace(tiny, schedule=ScheduleConfig(phases=(PHASE, dataclasses.replace(PHASE, tokens=157))))
    assert longer.schedule.total_tokens == 257
    assert longer.num_steps == 2  # the last step may reach beyond the end


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.seed = 1
