"""The engine's configuration, checked at construction like those in `stepjax.config`."""

import dataclasses
from typing import Literal

from stepjax.errors import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The inference engine. All sizes here are static shapes: requests never trigger compilation."""

    max_sequences: int = 16  # sequences decoded together
    smallest_batch: int = 1  # smallest decode batch bucket; larger values compile fewer shapes
    max_context: int | None = None  # tokens of prompt plus answer; None: the decoder's max_positions
    page_size: int = 64  # tokens per page of the key-value cache
    cache_tokens: int | None = None  # total cache capacity in tokens; None: max_sequences times max_context
    prefill_tokens: int = 512  # prompt tokens, of any number of prompts, computed between two decoding steps
    decode_steps: int = 1  # tokens per sequence and device call; more means fewer calls and coarser streaming
    max_prefix_groups: int = 8  # prefix groups per decoding step; a group's shared pages are read once
    prefix_caching: bool = True  # keep pages of finished requests for prompts with the same prefix
    view_batch: int | None = None  # most views per encoder call; None: as many as cost about as much as prefill_tokens
    feature_cache_tokens: int = 16_384  # tokens of image features kept on the device
    weights: Literal["int8"] | None = None  # int8: decoder weights with a scale per output; None: the model's dtype
    max_waiting: int = 1024  # queued samples; further requests are refused

    def __post_init__(self):
        require_positive("engine", self, "max_sequences", "prefill_tokens", "decode_steps", "max_prefix_groups")
        remedy = f"must be from 1 to max_sequences {self.max_sequences}"
        require("engine", self, smallest_batch=(0 < self.smallest_batch <= self.max_sequences, remedy))
        require_positive("engine", self, "feature_cache_tokens", "max_waiting")
        require("engine", self, weights=(self.weights in (None, "int8"), "None or int8"))
        for name in ("max_context", "cache_tokens", "view_batch"):
            if getattr(self, name) is not None:
                require_positive("engine", self, name)
        require("engine", self, page_size=(self.page_size in (16, 32, 64, 128, 256), "16, 32, 64, 128 or 256"))
