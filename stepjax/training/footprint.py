"""FLOPs and per-device memory of a training step, by arithmetic.

`stepjax pretrain --dry-run` prints them; `stepjax plan` uses them to skip layouts that cannot fit and to suggest some
that would. The arithmetic covers what a layer keeps under each rematerialisation policy and the few largest buffers.
The rest is up to the compiler, so this does not replace the compiler's figure.
"""

import dataclasses
import functools

import jax

from stepjax.config import LoraConfig, ModelConfig, PretrainConfig, RematPolicy
from stepjax.models import lora
from stepjax.models.flops import training_flops
from stepjax.models.step_vl import abstract_model, num_parameters

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB of one device."""

    parameters: float
    optimizer: float = 0.0
    batch: float = 0.0
    activations: float = 0.0  # kept by the forward pass for the backward pass
    gradients: float = 0.0
    temporaries: float = 0.0  # everything else

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    return num_parameters(abstract_model(config))


@functools.cache
def adapter_count(config: ModelConfig, adapters: LoraConfig) -> int:
    model = abstract_model(config)
    return num_parameters(jax.eval_shape(lambda: lora.init_adapters(adapters, model, 0)))


def step_flops(config: PretrainConfig, *, rows: int | None = None) -> float:
    """Model FLOPs of a training step (over `rows` rows) with all slots full and examples of maximal length."""
    batch, images = config.batch, config.images
    rows = batch.rows if rows is None else rows
    return training_flops(
        config.model,
        tokens=rows * batch.tokens,
        attention_pairs=rows * batch.attention_pairs,
        global_views=rows * batch.global_views,
        crops=rows * batch.crops,
        global_grid=images.global_grid,
        crop_grid=images.crop_grid,
    )


def predict_memory(config: PretrainConfig, num_devices: int) -> Memory:
    """Memory of a device with all parameters trained, or adapters. Temporaries are the few large ones, with copies."""
    model, numerics, batch, images = config.model, config.numerics, config.batch, config.images
    decoder, vision = model.decoder, model.vision
    slices, data, fsdp, context, tensor = config.mesh.shape(num_devices)
    rows = batch.rows / batch.accumulation / (slices * data * fsdp)  # of a micro-batch, on a device
    size = _BYTES[numerics.compute_dtype]
    parameters = parameter_count(model) * _BYTES[numerics.param_dtype] / (fsdp * tensor)
    pixels = batch.global_views * images.global_size**2 + batch.crops * images.crop_size**2
    in_batch = batch.rows / (slices * data * fsdp) * (3 * size * pixels + 6 * 4 * batch.tokens)

    def kept(policy: RematPolicy, width: int, qkv: int, attended: int, heads: int, hidden: int) -> float:
        """Bytes per token that a layer keeps for the backward pass."""
        attention = size * attended / tensor + 4 * heads / tensor  # output and log-sum-exp
        projections = size * ((qkv + hidden) / tensor + 2 * width)
        if policy == "full":
            return size * width
        if policy == "attention":
            return size * width + attention
        if policy == "qkv":
            return size * width + attention + size * qkv / tensor
        if policy == "dots":
            return size * width + projections + attention
        # "none": norms and activation functions also keep their inputs, some of them in float32.
        return size * 5 * width + attention + projections + size * (2 * qkv + hidden) / tensor

    of_globals, of_crops = batch.global_views * images.global_grid**2, batch.crops * images.crop_grid**2
    tokens, patches = rows * batch.tokens / context, rows * (of_globals + of_crops) / context
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    policy, encoder_policy = numerics.remat, numerics.policy_of_encoder
    of_token = kept(policy, decoder.width, heads + 2 * kv_heads, heads, decoder.num_heads, 2 * decoder.mlp_dim)
    of_patch = kept(encoder_policy, vision.width, 3 * vision.width, vision.width, vision.num_heads, vision.mlp_dim)
    activations = tokens * decoder.num_layers * of_token + patches * vision.num_layers * of_patch

    # The widest arrays of a layer's backward pass, and the whole output projection with its gradient.
    widest = max(tokens * 2 * decoder.mlp_dim, rows * max(of_globals, of_crops) / context * vision.mlp_dim)
    temporaries = 3 * size * widest / tensor
    temporaries += decoder.width * decoder.vocab_size / tensor * (4 + size)
    temporaries += 2 * 4 * min(numerics.loss_chunk, tokens) * decoder.vocab_size / tensor  # logits
    if numerics.attention == "xla":  # materializes the float32 scores and their exponentials
        of_decoder, of_crops, of_globals = (
            2 * 4 * rows * pairs / (context * tensor)
            for pairs in (
                batch.tokens**2 * decoder.num_heads,
                batch.crops * images.crop_grid**4 * vision.num_heads,
                batch.global_views * images.global_grid**4 * vision.num_heads,
            )
        )
        temporaries += max(of_decoder, of_crops, of_globals)
        activations += of_decoder * decoder.num_layers * (policy == "none")
        activations += (of_crops + of_globals) * vision.num_layers * (encoder_policy == "none")
    trained = parameters
    if config.adapters is not None:  # in float32
        trained = adapter_count(model, config.adapters) * 4 / (fsdp * tensor)
        parameters += trained
    gradients = trained * (2 if batch.accumulation > 1 else 1)
    parts = (parameters, 2 * trained, in_batch, activations, gradients, temporaries)
    return Memory(*(part / GIB for part in parts))
