"""Answers from coded images, as between a device and a server: image to frame, frame to features, features to answer.

Legend: N features, C channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from stepjax.config import EvaluationConfig
from stepjax.errors import ConfigError
from stepjax.evaluation.evaluate import Report, evaluate
from stepjax.models.step_vl import StepVL
from stepjax.processing.image_files import open_image
from stepjax.processing.images import CodedImage
from stepjax.processing.processor import Processor
from stepjax.tofc import codec
from stepjax.tofc.codec import decode_image
from stepjax.tofc.device import Device

_CHUNK = 256  # features whose bits are estimated at a time


def evaluate_coded(
    model: StepVL, processor: Processor, device: Device, config: EvaluationConfig, *, seed: int
) -> tuple[Report, dict[str, Any]]:
    """`evaluate` with the images of questions coded, and what they cost.

    Returns:
        The report, and of a picture: "bytes" and "bytes_95" (mean and 95th percentile of the frames), "payload" (mean
        without headers and checksums), "estimate" (mean of what training takes the payload for), "encoder_ms" and
        "coder_ms" (medians).

    Raises:
        ConfigError, RecordError: as `evaluate`, or no question has an image.
        BitstreamError: a feature cannot be coded.
    """
    frames, payloads, times, features = [], [], [], []

    def coded(image: Any, *, name: str, frame: int | None = None) -> CodedImage:
        pixels: Image.Image = open_image(image, name=name, frame=frame)
        made = device.encode(pixels)
        frames.append(len(made.frame))
        payloads.append(sum(map(len, codec.parse(made.frame).payloads)))
        times.append((made.encoder, made.coder))
        features.extend(made.tiles)
        return decode_image(device.tables, made.frame, processor.image_config)

    report = evaluate(model, processor, config, seed=seed, open_image=coded)
    if not frames:
        raise ConfigError("evaluation.sources: no question has an image; there is nothing to code")
    encoder, coder = np.median(np.array(times), axis=0)
    return report, {
        "pictures": len(frames),
        "bytes": float(np.mean(frames)),
        "bytes_95": float(np.percentile(frames, 95)),
        "payload": float(np.mean(payloads)),
        "estimate": estimated_bits(model, np.concatenate(features)) / 8 / len(frames),
        "encoder_ms": float(encoder),
        "coder_ms": float(coder),
    }


def estimated_bits(model: StepVL, x_NC: np.ndarray) -> float:
    """The rate of merged features by the entropy model in JAX, with one expert each."""
    assert model.tofc is not None

    @jax.jit
    def bits(hyperprior, x_NC, mask_N):
        return jnp.sum(hyperprior(x_NC, mask_N=mask_N, hard=True).bits_N)

    total = 0.0
    for first in range(0, len(x_NC), _CHUNK):
        part_NC = x_NC[first : first + _CHUNK]
        mask_N = np.arange(_CHUNK) < len(part_NC)
        part_NC = np.pad(part_NC, ((0, _CHUNK - len(part_NC)), (0, 0)))
        total += float(bits(model.tofc.hyperprior, part_NC, mask_N))
    return total
