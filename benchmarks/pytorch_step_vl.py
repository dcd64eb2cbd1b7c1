"""STEP3-VL in plain PyTorch, for packed rows: the peer of benchmarks/train_step_vs_pytorch.py, in its best form.

SDPA attention, PyTorch's own norms, static shapes, no graph breaks. Modules are named so that the keys of `state_dict`
are those of the public checkpoint; `load` fills them from our parameters.

Legend: B rows, T tokens, M views, P patches of a view, E encoder width, N heads, H head dim, F features of a row,
D decoder width.
"""

from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from stepjax.config import DecoderConfig, ModelConfig, VisionConfig
from stepjax.interop.hf_layout import step_vl_tensors
from stepjax.interop.hf_match import places
from stepjax.sharding import named_leaves

Batch = dict[str, Any]


def rotate(x_BNTH, cos, sin):
    low, high = x_BNTH.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class EncoderAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        E = config.width
        self.heads = config.num_heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.zeros(3 * E, E)), nn.Parameter(torch.zeros(3 * E))
        self.out_proj = nn.Linear(E, E)

    def forward(self, x_MPE, cos_PH, sin_PH):
        views, patches, _ = x_MPE.shape
        qkv = F.linear(x_MPE, self.in_proj_weight, self.in_proj_bias).view(views, patches, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos_PH, sin_PH), rotate(k, cos_PH, sin_PH), v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(config.width, config.mlp_dim), nn.Linear(config.mlp_dim, config.width)

    def forward(self, x_MPE):
        hidden = self.c_fc(x_MPE)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class LayerScale(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(config.width))

    def forward(self, x_MPE):
        return x_MPE * self.gamma


class EncoderBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=config.norm_eps) for _ in range(2))
        self.attn, self.mlp = EncoderAttention(config), EncoderMLP(config)
        self.ls_1, self.ls_2 = LayerScale(config), LayerScale(config)

    def forward(self, x_MPE, cos_PH, sin_PH):
        x_MPE = x_MPE + self.ls_1(self.attn(self.ln_1(x_MPE), cos_PH, sin_PH))
        return x_MPE + self.ls_2(self.mlp(self.ln_2(x_MPE)))


class EncoderBlocks(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        E, p = config.width, config.patch_size
        self.conv1 = nn.Conv2d(3, E, p, stride=p, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.position_grid**2, E))
        self.ln_pre = nn.LayerNorm(E, eps=config.norm_eps)
        self.transformer = EncoderBlocks(config)
        self.vit_downsampler1 = nn.Conv2d(E, 2 * E, 3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * E, 4 * E, 3, stride=2, padding=1)

    def forward(self, views_M3SS):
        x = self.conv1(views_M3SS)
        grid, size, table_PE = x.shape[-1], self.config.position_grid, self.positional_embedding
        if grid != size:
            table = table_PE.T.reshape(1, -1, size, size)
            table = F.interpolate(table, size=(grid, grid), mode="bilinear", align_corners=False)
            table_PE = table[0].flatten(1).T
        x_MPE = self.ln_pre(x.flatten(2).transpose(1, 2) + table_PE)
        per_axis = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(0, per_axis, 2, dtype=torch.float32) / per_axis)
        patch = torch.arange(grid * grid)
        angles = torch.cat([(patch % grid)[:, None] * frequencies, (patch // grid)[:, None] * frequencies], -1)
        cos_PH, sin_PH = angles.cos(), angles.sin()
        for block in self.transformer.resblocks:
            x_MPE = block(x_MPE, cos_PH, sin_PH)
        x = x_MPE.transpose(1, 2).unflatten(2, (grid, grid))
        return self.vit_downsampler2(self.vit_downsampler1(x)).flatten(2).transpose(1, 2)


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = H
        self.q_proj, self.o_proj = nn.Linear(D, N * H, bias=False), nn.Linear(N * H, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, K * H, bias=False), nn.Linear(D, K * H, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(H, eps=config.norm_eps), nn.RMSNorm(H, eps=config.norm_eps)

    def forward(self, x_BTD, cos, sin, mask):
        q, k, v = (p(x_BTD).unflatten(2, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.width, config.mlp_dim, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x_BTD):
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn, self.mlp = DecoderAttention(config), DecoderMLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, x_BTD, *rotary_and_mask):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), *rotary_and_mask)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)


class StepVL(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.decoder.width
        self.vision_model, self.model = Encoder(config.vision), Decoder(config.decoder)
        self.vit_large_projector = nn.Linear(4 * config.vision.width, D, bias=config.projector_bias)
        self.lm_head = nn.Linear(D, config.decoder.vocab_size, bias=False)

    def forward(self, batch: Batch):
        """Hidden states [B, T, D] of packed rows. Padding attends to padding, which nothing else sees."""
        config, (rows, length) = self.config.decoder, batch["tokens_BT"].shape
        encoded = (self.vit_large_projector(self.vision_model(batch[name])) for name in ("crops", "global_views"))
        features_BFD = torch.cat([x.reshape(rows, -1, config.width) for x in encoded], 1)
        index_BT1 = batch["feature_index_BT"][..., None]
        gathered = features_BFD.gather(1, index_BT1.clamp(min=0).expand(-1, -1, config.width))
        x_BTD = torch.where(index_BT1 >= 0, gathered, self.model.embed_tokens(batch["tokens_BT"]))

        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = batch["positions_BT"][:, None, :, None].float() * config.rope_theta**-exponents
        ids_BT = batch["segment_ids_BT"]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (ids_BT[:, None, :, None] == ids_BT[:, None, None, :]) & causal
        cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos, sin, mask)
        return self.model.norm(x_BTD)

    def losses(self, batch: Batch, z_loss: float):
        """The loss to differentiate and the mean cross-entropy, both weighted."""
        logits = self.lm_head(self(batch)).flatten(0, 1)
        weights = batch["loss_weights_BT"].roll(-1, 1).flatten()
        targets = batch["tokens_BT"].roll(-1, 1).flatten()
        total = weights.sum().clamp(min=1e-6)
        mean = (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total
        if not z_loss:
            return mean, mean
        return mean + z_loss * (weights * logits.logsumexp(-1).square()).sum() / total, mean


def load(model: Any, config: ModelConfig) -> StepVL:
    """Our parameters in PyTorch. Rotary pairs of the encoder become halves, so that both towers rotate alike."""
    ours = {name: np.asarray(jax.tree.leaves(leaf)[0]) for name, leaf in named_leaves(model).items()}
    state = {}
    for place in places(step_vl_tensors(config), {name: array.shape for name, array in ours.items()}):
        array = ours[place.tensor.name] if place.layer is None else ours[place.tensor.name][place.layer]
        tensor = torch.from_numpy(np.array(place.tensor.to_hf(array)))
        if ".in_proj_" in place.key:
            qk, v = tensor.split([2 * config.vision.width, config.vision.width])
            pairs = qk.unflatten(0, (2, config.vision.num_heads, -1, 2))
            tensor = torch.cat([pairs.transpose(2, 3).flatten(0, 3), v])
        state[place.key] = tensor
    peer = StepVL(config)
    peer.load_state_dict(state)
    return peer


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    """A host batch as tensors."""
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    batch = {name: x.long() if x.dtype == torch.int32 else x for name, x in tensors.items()}
    for name, key in (("global_views", "global_views_BGHWC"), ("crops", "crops_BCHWC")):
        batch[name] = batch.pop(key).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    return batch
