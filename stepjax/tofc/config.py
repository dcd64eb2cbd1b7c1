"""The configuration of merging and of the entropy model. It imports no JAX."""

import dataclasses
from typing import Literal

from stepjax.errors import require, require_not_negative, require_positive

Merging = Literal["density", "uniform"]

MAX_HIDDEN = 512  # the widest layer whose sums of 8-bit products are sure to be exact in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcConfig:
    """Which features are sent, how many, and how they are coded.

    The paper's abstract gives the stages; the widths, the temperature and both weights are our own (unconfirmed).
    """

    width: int  # channels of the features that the encoder's down-samplers give
    bottleneck: int | None = None  # channels that are merged and coded, by a learned map; None: all, without a map
    merging: Merging = "density"  # density peaks, or the means of equal rectangles of the grid
    neighbours: int = 5  # of a feature, itself included, whose distances make its density
    global_clusters: int = 32  # features sent of a global view
    crop_clusters: int = 16  # of a crop
    experts: int = 16
    hidden: int = 128  # width of the hidden layers of the router and of the experts
    latents: int | None = None  # values of side information a feature; None: a sixteenth of its channels
    initial_step: float = 0.5  # quantisation step at the start, in standard deviations of the channel
    temperature: float = 1.0  # of the router's softmax in training
    rate_weight: float = 1e-3  # lambda: loss in nats a bit per channel
    balance_weight: float = 1e-2

    def __post_init__(self):
        require_positive("tofc", self, "width", "neighbours", "global_clusters", "crop_clusters", "hidden")
        require_positive("tofc", self, "initial_step", "temperature")
        require_not_negative("tofc", self, "rate_weight", "balance_weight")
        if self.bottleneck is not None:
            require("tofc", self, bottleneck=(0 < self.bottleneck <= self.width, f"must be 1 to width {self.width}"))
        require("tofc", self, experts=(1 <= self.experts <= 256, "must be 1 to 256"))
        is_exact = self.hidden <= MAX_HIDDEN
        require("tofc", self, hidden=(is_exact, f"must be at most {MAX_HIDDEN}: sums would not be exact"))
        if self.latents is not None:
            require("tofc", self, latents=(1 <= self.latents <= 4096, "must be 1 to 4096"))

    @property
    def channels(self) -> int:
        """Channels of a coded feature."""
        return self.width if self.bottleneck is None else self.bottleneck

    @property
    def num_latents(self) -> int:
        return max(self.channels // 16, 1) if self.latents is None else self.latents
