"""Maps tensors of the public checkpoint to our parameters, and reshapes one into the other.

Public tensors follow PyTorch: linear weights [out, in], convolutions [out, in, height, width], one tensor per layer.
Ours put contracted dimensions first, split the heads, and stack the layers. Public keys come in two layouts; we read
both: the one on disk (`vision_model.*`, `model.layers.*`) and the one saved by Transformers (`model.vision_model.*`,
`model.language_model.*`).

Legend: N query heads, K key-value heads, H dimensions per head.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from stepjax.config import DecoderConfig, ModelConfig, VisionConfig

Array = np.ndarray


def _same(x: Array) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One public tensor (one per layer if its key has `{layer}`) and the parameter it fills."""

    key: str
    name: str  # our parameter, e.g. "decoder/blocks/mlp/up_kernel"
    to_ours: Callable[[Array], Array] = _same
    to_hf: Callable[[Array], Array] = _same
    is_copy: bool = False  # copy of a parameter that another tensor fills; optional in a checkpoint

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.key

    def hf_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the public tensor for a parameter (or one layer of a stacked parameter) of shape `ours`."""
        return self.to_hf(np.broadcast_to(np.float32(0), ours)).shape


def _linear(key: str, name: str) -> Tensor:
    return Tensor(key, name, lambda x: x.T, lambda x: x.T)


def _convolution(key: str, name: str) -> Tensor:
    return Tensor(key, name, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def _heads_in(key: str, name: str, *heads: int) -> Tensor:
    """[heads * H, width] to [width, heads, H]; `heads` are all dimensions but the first."""
    return Tensor(key, name, lambda x: x.T.reshape(-1, *heads), lambda x: x.reshape(x.shape[0], -1).T)


def _heads_out(key: str, name: str, *heads: int) -> Tensor:
    """[width, heads * H] to [heads, H, width]; `heads` are all dimensions but the last."""
    return Tensor(key, name, lambda x: x.T.reshape(*heads, -1), lambda x: x.reshape(-1, x.shape[-1]).T)


def vision_tensors(config: VisionConfig) -> list[Tensor]:
    """The encoder's and down-samplers' tensors."""
    N, H, grid = config.num_heads, config.head_dim, config.position_grid
    block, ours = "vision_model.transformer.resblocks.{layer}", "vision/blocks"
    table = (lambda x: x.reshape(grid, grid, -1)), (lambda x: x.reshape(grid * grid, -1))
    tensors = [
        _convolution("vision_model.conv1.weight", "vision/patch_kernel"),
        Tensor("vision_model.positional_embedding", "vision/positions", *table),
        Tensor("vision_model.ln_pre.weight", "vision/norm_pre/scale"),
        Tensor("vision_model.ln_pre.bias", "vision/norm_pre/bias"),
        _heads_in(f"{block}.attn.in_proj_weight", f"{ours}/attention/qkv_kernel", 3, N, H),
        Tensor(
            f"{block}.attn.in_proj_bias",
            f"{ours}/attention/qkv_bias",
            lambda x: x.reshape(3, N, H),
            lambda x: x.reshape(-1),
        ),
        _heads_out(f"{block}.attn.out_proj.weight", f"{ours}/attention/out_kernel", N, H),
        Tensor(f"{block}.attn.out_proj.bias", f"{ours}/attention/out_bias"),
        _linear(f"{block}.mlp.c_fc.weight", f"{ours}/mlp/up_kernel"),
        Tensor(f"{block}.mlp.c_fc.bias", f"{ours}/mlp/up_bias"),
        _linear(f"{block}.mlp.c_proj.weight", f"{ours}/mlp/down_kernel"),
        Tensor(f"{block}.mlp.c_proj.bias", f"{ours}/mlp/down_bias"),
    ]
    for i in (1, 2):
        tensors += [
            Tensor(f"{block}.ln_{i}.weight", f"{ours}/norm{i}/scale"),
            Tensor(f"{block}.ln_{i}.bias", f"{ours}/norm{i}/bias"),
            Tensor(f"{block}.ls_{i}.gamma", f"{ours}/scale{i}"),
            _convolution(f"vision_model.vit_downsampler{i}.weight", f"projector/down{i}/kernel"),
            Tensor(f"vision_model.vit_downsampler{i}.bias", f"projector/down{i}/bias"),
        ]
    return tensors


def decoder_tensors(config: DecoderConfig, prefix: str = "decoder/") -> list[Tensor]:
    """The decoder's tensors: plain Qwen3, or Llama without query and key norms; embeddings may be tied."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    layer, ours = "model.layers.{layer}", f"{prefix}blocks"
    tensors = [
        Tensor("model.embed_tokens.weight", f"{prefix}embedding"),
        Tensor("model.norm.weight", f"{prefix}norm/scale"),
        Tensor(f"{layer}.input_layernorm.weight", f"{ours}/norm1/scale"),
        Tensor(f"{layer}.post_attention_layernorm.weight", f"{ours}/norm2/scale"),
        _heads_in(f"{layer}.self_attn.q_proj.weight", f"{ours}/attention/q_kernel", N, H),
        _heads_in(f"{layer}.self_attn.k_proj.weight", f"{ours}/attention/k_kernel", K, H),
        _heads_in(f"{layer}.self_attn.v_proj.weight", f"{ours}/attention/v_kernel", K, H),
        _heads_out(f"{layer}.self_attn.o_proj.weight", f"{ours}/attention/out_kernel", N, H),
        _linear(f"{layer}.mlp.gate_proj.weight", f"{ours}/mlp/gate_kernel"),
        _linear(f"{layer}.mlp.up_proj.weight", f"{ours}/mlp/up_kernel"),
        _linear(f"{layer}.mlp.down_proj.weight", f"{ours}/mlp/down_kernel"),
    ]
    if config.qk_norm:
        tensors += [
            Tensor(f"{layer}.self_attn.{side}_norm.weight", f"{ours}/attention/{side}_norm/scale") for side in "qk"
        ]
    if not config.tie_embeddings:
        tensors.append(_linear("lm_head.weight", f"{prefix}head_kernel"))
    else:  # some writers store the tied head anyway
        tensors.append(Tensor("lm_head.weight", f"{prefix}embedding", is_copy=True))
    return tensors


def step_vl_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a STEP3-VL checkpoint, under its key on disk."""
    tensors = vision_tensors(config.vision) + decoder_tensors(config.decoder)
    tensors.append(_linear("vit_large_projector.weight", "projector/kernel"))
    if config.projector_bias:
        tensors.append(Tensor("vit_large_projector.bias", "projector/bias"))
    return tensors


def disk_key(key: str) -> str:
    """Converts a key of either public layout to the one on disk."""
    key = re.sub(r"^model\.(vision_model|vit_large_projector)\.", r"\1.", key)
    return re.sub(r"^model\.language_model\.", "model.", key)


# STEP3-VL keeps Meta's encoder keys; timm renamed them.
_TIMM_NAMES = (
    ("vision_model.", ""),
    ("transformer.resblocks.", "blocks."),
    ("conv1.", "patch_embed.proj."),
    ("positional_embedding", "pos_embed"),
    ("ln_pre.", "norm_pre."),
    ("ln_", "norm"),
    ("ls_1.gamma", "gamma_1"),
    ("ls_2.gamma", "gamma_2"),
    ("in_proj_", "qkv."),
    ("out_proj.", "proj."),
    ("c_fc.", "fc1."),
    ("c_proj.", "fc2."),
)


def timm_tensors(config: VisionConfig) -> list[Tensor]:
    """The encoder's tensors in timm's layout of a Perception Encoder (`vit_pe_lang_gigantic_patch14_448`)."""
    tensors = []
    for tensor in vision_tensors(config):
        if tensor.name.startswith("vision/"):
            key = tensor.key
            for theirs, timms in _TIMM_NAMES:
                key = key.replace(theirs, timms)
            tensors.append(dataclasses.replace(tensor, key=key))
            if key == "pos_embed":  # [1, patches, width]
                tensors[-1] = dataclasses.replace(tensors[-1], to_hf=lambda x: x.reshape(1, -1, x.shape[-1]))
    return tensors
