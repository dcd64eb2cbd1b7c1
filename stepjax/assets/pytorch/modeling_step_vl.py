"""STEP3-VL in PyTorch: encoder, projector and decoder as one model. Exported by stepjax; needs no other file of it.

Legend: B rows, T tokens, M views (G global views, C crops), S side of a view in pixels, P patches of a view, E encoder
width, N heads, H head dim, F features, D decoder width.

Modules are named so that the keys of `state_dict` are those of the public checkpoint: `vision_model.*`,
`vit_large_projector.*`, `model.*`, `lm_head.*`. The decoder is Transformers' own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_step_vl import StepRoboticsConfig

VISION_INPUTS = ("pixel_values", "patch_pixel_values", "num_patches")


def rotary_2d(grid: int, head_dim: int, theta: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [P, H] in float32: the first half of a head turns with the column, the second with the row.

    Positions are the patch's own column and row from 0, whatever the size of the view. Each angle stands twice, for
    the two of an adjacent pair.
    """
    per_axis = head_dim // 2
    frequencies_H = theta ** (-torch.arange(0, per_axis, 2, dtype=torch.float32, device=device) / per_axis)
    patch_P = torch.arange(grid * grid, device=device)
    column_P, row_P = patch_P % grid, patch_P // grid
    angles_PH = torch.cat([column_P[:, None] * frequencies_H, row_P[:, None] * frequencies_H], dim=-1)
    angles_PH = angles_PH.repeat_interleave(2, dim=-1)
    return angles_PH.cos(), angles_PH.sin()


def rotate_pairs(x_MNPH: torch.Tensor, cos_PH: torch.Tensor, sin_PH: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]), in float32."""
    x32_MNPH = x_MNPH.float()
    turned_MNPH = torch.stack([-x32_MNPH[..., 1::2], x32_MNPH[..., 0::2]], dim=-1).flatten(-2)
    return (x32_MNPH * cos_PH + turned_MNPH * sin_PH).to(x_MNPH.dtype)


class EncoderAttention(nn.Module):
    """Full bidirectional self-attention within a view."""

    def __init__(self, config):
        super().__init__()
        E = config.width
        self.num_heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * E, E) * E**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * E))
        self.out_proj = nn.Linear(E, E)

    def forward(self, x_MPE: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        views, patches, _ = x_MPE.shape
        qkv = F.linear(x_MPE, self.in_proj_weight, self.in_proj_bias)
        q_MNPH, k_MNPH, v_MNPH = qkv.view(views, patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_MNPH, k_MNPH = rotate_pairs(q_MNPH, *rotary), rotate_pairs(k_MNPH, *rotary)
        attended_MNPH = F.scaled_dot_product_attention(q_MNPH, k_MNPH, v_MNPH)
        return self.out_proj(attended_MNPH.transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.c_fc = nn.Linear(config.width, hidden)
        self.act = ACT2FN[config.hidden_act]
        self.c_proj = nn.Linear(hidden, config.width)

    def forward(self, x_MPE: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x_MPE)))


class LayerScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gamma = nn.Parameter(config.ls_init_value * torch.ones(config.width))

    def forward(self, x_MPE: torch.Tensor) -> torch.Tensor:
        return x_MPE * self.gamma


class EncoderBlock(nn.Module):
    """Pre-norm residual block with LayerScale."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = EncoderAttention(config)
        self.ls_1 = LayerScale(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)
        self.ls_2 = LayerScale(config)

    def forward(self, x_MPE: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x_MPE = x_MPE + self.ls_1(self.attn(self.ln_1(x_MPE), rotary))
        return x_MPE + self.ls_2(self.mlp(self.ln_2(x_MPE)))


class EncoderBlocks(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.resblocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))


class PerceptionEncoder(nn.Module):
    """Pixels of square views to the features that the projector takes: no class token, no pooling, no final norm.

    Absolute positions are learned on the global grid and interpolated for crops. Two stride-2 convolutions leave a
    sixteenth of the patches, without a norm or an activation between them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, p = config.width, config.patch_size
        self.position_grid = config.image_size // p
        self.conv1 = nn.Conv2d(3, E, kernel_size=p, stride=p, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(self.position_grid**2, E) * E**-0.5)
        self.ln_pre = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.transformer = EncoderBlocks(config)
        self.vit_downsampler1 = nn.Conv2d(E, 2 * E, kernel_size=3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * E, 4 * E, kernel_size=3, stride=2, padding=1)

    def forward(self, views_M3SS: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [M, 3, side, side] to [M, tokens of a view, 4 * E], row-major."""
        x_MEgg = self.conv1(views_M3SS.to(self.conv1.weight.dtype))
        grid = x_MEgg.shape[-1]
        x_MPE = x_MEgg.flatten(2).transpose(1, 2) + self._positions(grid).to(x_MEgg.dtype)
        x_MPE = self.ln_pre(x_MPE)
        rotary = rotary_2d(grid, self.config.width // self.config.heads, self.config.rope_theta, x_MPE.device)
        for block in self.transformer.resblocks:
            x_MPE = block(x_MPE, rotary)
        x_MEgg = x_MPE.transpose(1, 2).unflatten(2, (grid, grid))
        return self.vit_downsampler2(self.vit_downsampler1(x_MEgg)).flatten(2).transpose(1, 2)

    def _positions(self, grid: int) -> torch.Tensor:
        table_PE, size = self.positional_embedding.float(), self.position_grid
        if grid == size:
            return table_PE
        table = table_PE.T.reshape(1, -1, size, size)
        table = F.interpolate(table, size=(grid, grid), mode="bilinear", align_corners=False)
        return table[0].flatten(1).T


class Step3VL10BForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model. Takes several images a row, and rows with different numbers of them."""

    config_class = StepRoboticsConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["EncoderBlock", "Qwen3DecoderLayer", "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: StepRoboticsConfig):
        super().__init__(config)
        text = config.text_config
        self.vision_model = PerceptionEncoder(config.vision_config)
        self.vit_large_projector = nn.Linear(
            4 * config.vision_config.width, text.hidden_size, bias=config.projector_bias
        )
        self.model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [F, D] in the order of the text: for every image its crops, then its global view.

        Args:
            pixel_values: [G, 3, side, side], the global views.
            patch_pixel_values: [C, 3, side, side], the crops of all images in order.
            num_patches: [G], how many of the crops are each image's.
        """

        def encode(views_M3SS: torch.Tensor) -> torch.Tensor:
            return self.vit_large_projector(self.vision_model(views_M3SS))

        global_GFD = encode(pixel_values)
        if patch_pixel_values is None or len(patch_pixel_values) == 0:
            return global_GFD.flatten(0, 1)
        if num_patches is None or len(num_patches) != len(pixel_values) or sum(num_patches) != len(patch_pixel_values):
            raise ValueError(
                f"num_patches={num_patches}: {len(pixel_values)} images and {len(patch_pixel_values)} crops are given"
            )
        crops_CFD = encode(patch_pixel_values).split([int(n) for n in num_patches])
        return torch.cat([part.flatten(0, -2) for pair in zip(crops_CFD, global_GFD, strict=True) for part in pair])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,  # the cache among them, whose name differs between versions of Transformers
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the images are")
            features_FD = self.get_image_features(pixel_values, patch_pixel_values, num_patches)
            is_image_BT = input_ids == self.config.image_token_id
            if is_image_BT.sum() != len(features_FD):
                raise ValueError(
                    f"the tokens have places for {int(is_image_BT.sum())} image features, and the images have "
                    f"{len(features_FD)}: pass the whole prompt that the processor made, not a part of it"
                )
            features_FD = features_FD.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(is_image_BT[..., None].to(inputs_embeds.device), features_FD)
        outputs = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **others)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # With a cache, images are wanted for the prompt alone. A generated <im_patch> is a token like any other.
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1 or not (ids == self.config.image_token_id).any():
            inputs = {name: value for name, value in inputs.items() if name not in VISION_INPUTS}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Rows are repeated one by one: a, a, b, b. Images follow their rows, which may have several.
        images = {name: kwargs.pop(name) for name in VISION_INPUTS if kwargs.get(name) is not None}
        if images and expand_size > 1:
            images = self._repeat_images(expand_size, input_ids, **images)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | images

    def _repeat_images(self, times, input_ids, pixel_values, num_patches, patch_pixel_values=None):
        crops_G = num_patches.to(input_ids.device)
        features_G = crops_G * self.config.patch_token_len + self.config.image_token_len
        ends_B = (input_ids == self.config.image_token_id).sum(1).cumsum(0)
        row_G = torch.searchsorted(ends_B, features_G.cumsum(0))  # of each image
        row_C = row_G.repeat_interleave(crops_G)  # of each crop

        def repeated(values, rows):
            order = [(rows == row).nonzero()[:, 0] for row in range(len(ends_B)) for _ in range(times)]
            return values[torch.cat(order).to(values.device)]

        images = {"pixel_values": repeated(pixel_values, row_G), "num_patches": repeated(num_patches, row_G)}
        if patch_pixel_values is not None:
            images["patch_pixel_values"] = repeated(patch_pixel_values, row_C)
        return images
