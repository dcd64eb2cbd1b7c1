"""The engine's configuration. As those of `stepjax.config`, it is checked at construction."""

import dataclasses

from stepjax.errors import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The inference engine. Everything here that has a size is a static shape: requests never compile anything."""

    max_sequences: int = 16  # sequences decoded together
    smallest_batch: int = 1  # smallest decode batch bucket; larger values compile fewer shapes
    max_context: int | None = None  # tokens of prompt and answer; None: the decoder's max_positions
    page_size: int = 64  # tokens of a page of the key-value cache
    cache_tokens: int | None = None  # tokens that all pages hold together; None: max_sequences times max_context
    prefill_tokens: int = 512  # tokens of prompts computed between two decoding steps
    decode_steps: int = 1  # tokens of every sequence in one call of the device: fewer calls, coarser streaming
    max_prefix_groups: int = 8  # groups of sequences whose shared pages are read once in a decoding step
    prefix_caching: bool = True  # keep pages of finished requests for prompts that begin alike
    view_batch: int = 4  # views in one call of the encoder
    feature_cache_tokens: int = 16_384  # image features kept on the device
    max_waiting: int = 1024  # samples in the queue; more are refused

    def __post_init__(self):
        require_positive("engine", self, "max_sequences", "prefill_tokens", "decode_steps", "max_prefix_groups")
        remedy = f"must be from 1 to max_sequences {self.max_sequences}"
        require("engine", self, smallest_batch=(0 < self.smallest_batch <= self.max_sequences, remedy))
        require_positive("engine", self, "view_batch", "feature_cache_tokens", "max_waiting")
        for name in ("max_context", "cache_tokens"):
            if getattr(self, name) is not None:
                require_positive("engine", self, name)
        require("engine", self, page_size=(self.page_size in (16, 32, 64, 128, 256), "16, 32, 64, 128 or 256"))
