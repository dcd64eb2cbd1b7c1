"""The typed configuration: frozen dataclasses, built by the Python files in `configs/`.

A recipe describes the whole run, and its class says which kind: `PretrainConfig` or `SftConfig`. What all kinds have in
common is in `RunConfig`. Every field is a command-line option (`--optimizer.weight-decay 0.1`). An invalid value raises
an error at construction that names the field.

The model and image classes default to the public checkpoint. Fields that the technical report leaves open are marked
"Unconfirmed" and default to the likeliest value.
"""

import dataclasses
import math
from typing import Literal

from stepjax.errors import ConfigError, require, require_not_negative, require_positive

DType = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "full", "dots", "attention", "qkv"]
AttentionImplementation = Literal["auto", "xla", "tpu", "gpu"]
Activation = Literal["quick_gelu", "gelu"]
Resize = Literal["bilinear", "bicubic"]
Merging = Literal["density", "uniform"]

MAX_HIDDEN = 512  # the widest layer of an entropy model whose sums of 8-bit products are sure to be exact in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Perception Encoder ("PE-lang G/14") and its two stride-2 convolutions."""

    width: int = 1536
    num_layers: int = 47
    num_heads: int = 16
    mlp_dim: int = 8960
    patch_size: int = 14  # pixels
    position_grid: int = 52  # the learned position table covers position_grid x position_grid patches
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    layer_scale_init: float = 0.1
    activation: Activation = "quick_gelu"  # of the MLP; Meta's PE-lang release uses the exact "gelu"

    def __post_init__(self):
        require_positive("vision", self, "width", "num_layers", "num_heads", "mlp_dim", "patch_size", "position_grid")
        require("vision", self, num_heads=(self.width % self.num_heads == 0, f"must divide width {self.width}"))
        has_pairs = self.head_dim % 4 == 0
        require("vision", self, num_heads=(has_pairs, "width / num_heads must be a multiple of 4 (2-D rotary)"))

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Qwen3-8B by default. `qk_norm=False` with `tie_embeddings=True` gives a plain Llama-like decoder."""

    vocab_size: int = 151_936
    width: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 12_288
    norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    qk_norm: bool = True
    tie_embeddings: bool = False
    max_positions: int = 65_536
    # YaRN (arXiv 2309.00071) stretches rotary positions. PaCoRe serves 131,072 positions with factor 2 and attention
    # factor 1; the YaRN paper would use 0.1 ln(factor) + 1.
    yarn_factor: float = 1.0  # 1: off
    yarn_trained_positions: int = 65_536
    yarn_attention_factor: float = 1.0  # scales cosines and sines, so scores by its square

    def __post_init__(self):
        require_positive("decoder", self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_positive("decoder", self, "mlp_dim", "max_positions", "yarn_trained_positions", "yarn_attention_factor")
        is_divisor = self.num_heads % self.num_kv_heads == 0
        require("decoder", self, num_kv_heads=(is_divisor, f"must divide num_heads {self.num_heads}"))
        require("decoder", self, head_dim=(self.head_dim % 2 == 0, "must be even (rotary pairs)"))
        require("decoder", self, yarn_factor=(self.yarn_factor >= 1, "must be at least 1 (off)"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofcConfig:
    """Which features of a view a device sends, how many, and how they are coded (stepjax.tofc).

    The paper's abstract gives the stages; the widths, the temperatures and both weights are our own (unconfirmed).
    """

    width: int = 6144  # channels of the features that the encoder's down-samplers give: 4 x vision.width
    bottleneck: int | None = None  # channels that are merged and coded, by a learned map; None: all, without a map
    merging: Merging = "density"  # density peaks, or the means of equal rectangles of the grid
    neighbours: int = 5  # of a feature, itself included, whose distances make its density
    global_clusters: int = 32  # features sent of a global view, if it has more
    crop_clusters: int = 16  # of a crop
    experts: int = 16
    hidden: int = 128  # width of the hidden layers of the router and of the experts
    latents: int | None = None  # side information of a feature; None: a sixteenth of its channels; 0: no hyperprior
    initial_step: float = 0.5  # quantisation step at the start, in standard deviations of the channel
    temperature: float = 1.0  # of the router's softmax at the start; it falls to the last one by half of the run
    last_temperature: float = 0.02
    rate_weight: float = 1e-3  # lambda: loss in nats a bit per channel
    balance_weight: float = 1e-2

    def __post_init__(self):
        require_positive("tofc", self, "width", "neighbours", "global_clusters", "crop_clusters", "hidden")
        require_positive("tofc", self, "initial_step", "temperature", "last_temperature")
        require_not_negative("tofc", self, "rate_weight", "balance_weight")
        if self.bottleneck is not None:
            require("tofc", self, bottleneck=(0 < self.bottleneck <= self.width, f"must be 1 to width {self.width}"))
        require("tofc", self, experts=(1 <= self.experts <= 256, "must be 1 to 256"))
        is_exact = self.hidden <= MAX_HIDDEN
        require("tofc", self, hidden=(is_exact, f"must be at most {MAX_HIDDEN}: sums would not be exact"))
        if self.latents is not None:
            require("tofc", self, latents=(0 <= self.latents <= 4096, "must be 0 to 4096"))

    @property
    def channels(self) -> int:
        """Channels of a coded feature."""
        return self.width if self.bottleneck is None else self.bottleneck

    @property
    def num_latents(self) -> int:
        return max(self.channels // 16, 1) if self.latents is None else self.latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder, projector and decoder. The defaults are STEP3-VL-10B: 10,171,750,144 parameters."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    projector_bias: bool = False
    init_range: float = 0.02  # standard deviation of the embeddings; matrices use 1 / sqrt(fan_in)
    tofc: TofcConfig | None = None  # merges and codes the features of views, before the projector's matrix

    def __post_init__(self):
        if self.tofc is not None:
            fits, width = self.tofc.width == 4 * self.vision.width, 4 * self.vision.width
            require("model.tofc", self.tofc, width=(fits, f"must be 4 x model.vision.width = {width}"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Precision against memory. Softmax, norms, rotary angles and losses are always float32."""

    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    remat: RematPolicy = "full"  # what the backward pass recomputes: see stepjax.models.remat
    encoder_remat: RematPolicy | None = None  # for the vision encoder; None: as `remat`
    attention: AttentionImplementation = "auto"  # Mosaic on TPU, cuDNN ("gpu") on GPU in bfloat16, XLA elsewhere
    loss_chunk: int = 2048  # tokens whose logits are in memory at a time

    def __post_init__(self):
        require_positive("numerics", self, "loss_chunk")

    @property
    def policy_of_encoder(self) -> RematPolicy:
        return self.remat if self.encoder_remat is None else self.encoder_remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The multi-crop views. Lengths are pixels; the defaults are the public checkpoint's."""

    global_size: int = 728
    crop_size: int = 504
    patch_size: int = 14
    max_side: int = 3024
    small_aspect: float = 1.5  # images within global_size are cropped only beyond this aspect ratio
    elongated_aspect: float = 4.0  # beyond this aspect ratio the crop window shrinks to the short side
    round_up_fraction: float = 0.2  # a remainder above this fraction of a window gets its own window
    thin_side: int = 32  # thinner images beyond elongated_aspect are padded to a square
    small_is_inclusive: bool = True  # `long side <= global_size` is small; False is `<`. Unconfirmed for the 10B.
    max_crops: int | None = 128  # refuse images that need more crops; None: no limit
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # The most tokens of a global view and of a crop, where the model merges them; set by `merged_for`.
    most_tokens: tuple[int, int] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        require_positive("images", self, "global_size", "crop_size", "patch_size", "max_side")
        remedy = f"must be a multiple of patch_size {self.patch_size}"
        for name in ("global_size", "crop_size"):
            require("images", self, **{name: (getattr(self, name) % self.patch_size == 0, remedy)})

    @property
    def global_grid(self) -> int:
        """Patches along a side of the global view."""
        return self.global_size // self.patch_size

    @property
    def crop_grid(self) -> int:
        """Patches along a side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def global_tokens(self) -> int:
        """Tokens of a global view after the two stride-2 convolutions (169 at 728 pixels), and after merging."""
        tokens = down_sampled(self.global_grid) ** 2
        return tokens if self.most_tokens is None else min(tokens, self.most_tokens[0])

    @property
    def crop_tokens(self) -> int:
        """Tokens of a crop (81 at 504 pixels)."""
        tokens = down_sampled(self.crop_grid) ** 2
        return tokens if self.most_tokens is None else min(tokens, self.most_tokens[1])

    def merged_for(self, model: ModelConfig) -> "ImageConfig":
        """The same views with as many tokens as this model makes of them. A run's images are always so."""
        tofc, images = model.tofc, dataclasses.replace(self)
        most = None if tofc is None else (tofc.global_clusters, tofc.crop_clusters)
        object.__setattr__(images, "most_tokens", most)
        return images


def down_sampled(grid: int) -> int:
    """Side of a patch grid after two convolutions with kernel 3, stride 2, padding 1."""
    for _ in range(2):
        grid = (grid - 1) // 2 + 1
    return grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = "demo"  # a `tokenizer.json`, a directory with one, or "demo" for the small bundled one
    generation_starts_thinking: bool = True  # the generation prompt ends with "<think>\n". Unconfirmed for the 10B.


DigitsTask = Literal[
    "transcribe",
    "count",
    "add",
    "point",
    "arithmetic",
    "ledger",
    "smudged",
    "receipt",
    "misprint",
    "printed",
    "prefer",
    "synthesis",
    "ledger_synthesis",
]
Split = Literal["train", "held_out"]
BadRecords = Literal["error", "skip"]
ChangedFiles = Literal["error", "accept"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """Images composed on the fly from scikit-learn's scans of handwritten digits."""

    name: str
    weight: float
    task: DigitsTask
    split: Split = "train"
    degradation: float = 0.0  # how far ink fades and paper gets specks, 0..1; each digit's share is random

    def __post_init__(self):
        require(f"data.sources.{self.name}", self, degradation=(0 <= self.degradation <= 1, "must be from 0 to 1"))


DocumentsTask = Literal["read", "count", "point"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsSource:
    """Square pages composed on the fly: handwritten fields, marks and text on worn paper."""

    name: str
    weight: float
    task: DocumentsTask
    split: Split = "train"
    wear: float = 1.0  # strength of grain, stains and uneven light, 0..1; it costs image codecs bytes
    as_text: bool = False  # a page's transcript in place of its image

    def __post_init__(self):
        require(f"data.sources.{self.name}", self, wear=(0 <= self.wear <= 1, "must be from 0 to 1"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlSource:
    """One JSON record per line: `{"messages": [...]}` or `{"text": ...}`; image paths are relative to the file."""

    name: str
    weight: float
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordSource:
    """The same JSON records in ArrayRecord files, for random access at scale. Images are data URIs or paths."""

    name: str
    weight: float
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisSource:
    """PaCoRe's training prompts: problems of a cache with some of their messages (`stepjax.data.synthesis`)."""

    name: str
    weight: float
    path: str  # of the cache, which `stepjax pacore cache` writes
    references: tuple[int, int] = (16, 24)  # fewest and most messages of a prompt; the number is uniform
    template: str | None = None  # "short", or a Jinja file, instead of the built-in template
    images: Literal["before", "after"] = "before"  # the text

    def __post_init__(self):
        fewest, most = self.references
        fits = 1 <= fewest <= most
        require(f"data.sources.{self.name}", self, references=(fits, "give the fewest and the most, at least 1"))


Source = DigitsSource | DocumentsSource | JsonlSource | ArrayRecordSource | SynthesisSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: tuple[Source, ...] = ()
    bad_records: BadRecords = "error"  # what to do with malformed records and examples larger than a row
    changed_files: ChangedFiles = "error"  # what to do on resume if data files have changed since the checkpoint
    open_rows: int = 4  # rows that a packing stream keeps open to find the best fit
    num_workers: int = 0  # processes that read and pack; 0: a thread of the trainer
    prefetch: int = 4  # batches prepared ahead

    def __post_init__(self):
        require_positive("data", self, "open_rows", "prefetch")
        require_not_negative("data", self, "num_workers")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.sources={names}: give every source a unique name")
        for source in self.sources:
            require_positive(f"data.sources.{source.name}", source, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """One optimizer step. The row budgets are static shapes: changing images never recompile."""

    rows: int  # rows of the global batch; also the number of packing streams
    tokens: int = 4096  # per row
    example_tokens: int | None = None  # longest example accepted; None: a whole row
    global_views: int = 4  # per row
    crops: int = 16  # per row
    accumulation: int = 1  # micro-batches that the rows are split into

    def __post_init__(self):
        require_positive("batch", self, "rows", "tokens", "accumulation")
        require_not_negative("batch", self, "global_views", "crops")
        fits = self.example_tokens is None or 0 < self.example_tokens <= self.tokens
        require("batch", self, example_tokens=(fits, f"must be from 1 to batch.tokens={self.tokens}"))
        require("batch", self, accumulation=(self.rows % self.accumulation == 0, f"must divide rows {self.rows}"))

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch."""
        return self.rows // self.accumulation

    @property
    def attention_pairs(self) -> float:
        """(query, key) pairs of causal attention in a row full of examples of maximal length."""
        return self.tokens * ((self.example_tokens or self.tokens) + 1) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the learning-rate schedule, measured in tokens (row slots, padding included)."""

    tokens: float
    start: float  # learning rate at the start
    end: float  # learning rate at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    phases: tuple[Phase, ...]
    warmup_tokens: float = 0.0  # linear from zero, inside the first phase. Unconfirmed.
    decay: Literal["cosine", "linear"] = "cosine"  # shape within a phase. Unconfirmed.

    def __post_init__(self):
        require("schedule", self, phases=(bool(self.phases), "needs at least one phase"))
        for i, phase in enumerate(self.phases):
            require_positive(f"schedule.phases.{i}", phase, "tokens")
            require_not_negative(f"schedule.phases.{i}", phase, "start", "end")
        ends_in_time = self.warmup_tokens <= self.phases[0].tokens
        require("schedule", self, warmup_tokens=(ends_in_time, "must end within the first phase"))

    @property
    def total_tokens(self) -> float:
        return sum(phase.tokens for phase in self.phases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the report's constants (section 2.3)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_vectors: bool = False  # also decay biases, norm scales and layer scales. Unconfirmed.
    clip_norm: float | None = 1.0  # global gradient norm. Unconfirmed.
    # Regular expressions over parameter names ("vision/", "decoder/embed", ...). The first match wins.
    learning_rate_scales: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Sources of a new run's initial parameters; a part without a source starts from random values.

    A source is a Hugging Face directory (STEP3-VL, or a Qwen3 or Llama text model for the decoder), a Perception
    Encoder in timm's safetensors layout, a converted checkpoint, or the last checkpoint of a run ("gs://..." too). The
    position table is resized to model.vision.position_grid, by default as the model resizes it for crops: bilinear,
    half-pixel centres, no antialiasing.
    """

    path: str | None = None  # source of every part without its own
    vision: str | None = None
    projector: str | None = None  # the two convolutions and the linear layer
    decoder: str | None = None
    resize: Resize = "bilinear"  # of the position table; timm uses "bicubic" with antialiasing. Unconfirmed.
    resize_antialias: bool = False  # of the position table; matters only if it shrinks. Unconfirmed.
    new_embedding_rows: bool = False  # let ids beyond the source's vocabulary start from random embeddings

    def __post_init__(self):
        for name in ("path", "vision", "projector", "decoder"):
            if getattr(self, name) == "":
                raise ConfigError(f"init_from.{name}='': name a source, or None to start from random values")

    @property
    def sources(self) -> dict[str, str | None]:
        """The source of each part of the model."""
        parts = {"vision": self.vision, "projector": self.projector, "decoder": self.decoder}
        return {part: self.path if source is None else source for part, source in parts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    z_loss: float = 0.0  # weight of the squared log-normaliser


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 means all remaining devices. See MESHES for the usual ones."""

    slice: int = 1  # slices of a multi-slice job, joined by the data-centre network; each has a copy of the parameters
    data: int = 1  # copies of the parameters within a slice
    fsdp: int = -1  # shards of the parameters, gathered layer by layer
    context: int = 1  # shards of every row
    tensor: int = 1  # shards of every matrix

    def shape(self, num_devices: int) -> tuple[int, int, int, int, int]:
        """Sizes of (slice, data, fsdp, context, tensor) for `num_devices` devices."""
        sizes = [self.slice, self.data, self.fsdp, self.context, self.tensor]
        if not all(size == -1 or size > 0 for size in sizes):
            raise ConfigError(f"mesh={sizes}: an axis is positive, or -1")
        if sizes.count(-1) > 1:
            raise ConfigError(f"mesh={sizes}: at most one axis may be -1")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            axes = "the axes (slice, data, fsdp, context, tensor)"
            raise ConfigError(f"mesh={sizes}: {axes} must multiply to the {num_devices} devices present")
        slices, data, fsdp, context, tensor = sizes
        return slices, data, fsdp, context, tensor


# Start here: `mesh=MESHES["fsdp"]` in a recipe, or options such as `--mesh.tensor 4`.
MESHES = {
    "fsdp": MeshConfig(),
    "fsdp_tensor": MeshConfig(tensor=4),  # for small per-device batches, or layers too large to gather
    "context": MeshConfig(context=8),  # for rows too long for one device, such as 128k tokens
    "multislice": MeshConfig(slice=2),  # only gradients cross the data-centre network
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps
    keep: int = 3

    def __post_init__(self):
        require_positive("checkpoint", self, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeartbeatConfig:
    """When a multi-process run counts a process as lost or stuck. All in seconds."""

    every: float = 5.0
    lost_after: float = 60.0  # silence after which a process counts as lost
    warn_after: float = 60.0  # warn when the others have waited this long for a live process
    give_up_after: float = 3600.0  # end the run when they have waited this long

    def __post_init__(self):
        require_positive("heartbeat", self, "every", "lost_after", "warn_after", "give_up_after")
        require("heartbeat", self, lost_after=(self.lost_after > self.every, "must exceed heartbeat.every"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: int = 10  # steps between log lines
    tensorboard: bool = False
    wandb: bool = False
    profile: tuple[int, int] | None = None  # trace from the first to the last of these steps into OUT/profile

    def __post_init__(self):
        require_positive("logging", self, "every")
        first, last = self.profile or (1, 1)
        require("logging", self, profile=(1 <= first <= last, "must be a first step from 1 and a last step"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Questions answered greedily, and documents whose loss is measured."""

    sources: tuple[Source, ...] = ()
    examples: int = 200  # per source, at most
    max_new_tokens: int = 16
    batch_size: int = 64
    every: int | None = None  # steps between evaluations during training; None: at the end only

    def __post_init__(self):
        require_positive("evaluation", self, "examples", "max_new_tokens", "batch_size")
        require("evaluation", self, every=(self.every is None or self.every > 0, "must be positive, or None"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (stepjax.models.lora): only they are trained and saved; the model stays that of `init_from`."""

    rank: int = 0  # 0: no adapters; the model's own parameters are trained
    alpha: float = 16.0  # the product of an adapter's matrices is scaled by alpha / rank
    # Regular expressions over parameter names: the linear layers of the decoder ("q_kernel", "mlp/", ...) and
    # "projector/kernel" can have an adapter.
    targets: tuple[str, ...] = ("decoder/",)

    def __post_init__(self):
        require_not_negative("lora", self, "rank")
        require_positive("lora", self, "alpha")
        require("lora", self, targets=(bool(self.targets), "needs a pattern, such as 'decoder/'"))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of training run has: a model, its start, the data, the machine and the output."""

    name: str
    model: ModelConfig = ModelConfig()
    init_from: InitConfig = InitConfig()
    images: ImageConfig = ImageConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    numerics: NumericsConfig = NumericsConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    out: str = "runs"  # the run lives in OUT/NAME

    def __post_init__(self):
        require("", self, name=(bool(self.name), "must not be empty: the run lives in OUT/NAME"))
        require("", self, seed=(0 <= self.seed < 2**32, "must be from 0 to 4294967295: keys take 32 bits of it"))
        vision, images = self.model.vision, self.images
        is_same, remedy = vision.patch_size == images.patch_size, f"must equal vision.patch_size {vision.patch_size}"
        require("images", images, patch_size=(is_same, remedy))
        covers = vision.position_grid == images.global_grid
        remedy = f"must equal the {images.global_grid} patches along a global view"
        require("model.vision", vision, position_grid=(covers, remedy))
        images = images.merged_for(self.model)
        if images.most_tokens is not None and images.crop_grid == images.global_grid:
            is_same, remedy = len(set(images.most_tokens)) == 1, "must equal global_clusters: views have one size"
            require("model.tofc", self.model.tofc, crop_clusters=(is_same, remedy))
        object.__setattr__(self, "images", images)

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained in place of the model; None if the model is."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything that defines a pretraining run."""

    batch: BatchConfig
    schedule: ScheduleConfig
    loss: LossConfig = LossConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.batch.rows * self.batch.tokens

    @property
    def num_steps(self) -> int:
        return math.ceil(self.schedule.total_tokens / self.tokens_per_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(PretrainConfig):
    """Supervised fine-tuning: pretraining's loop on conversations, from a trained model, with or without adapters."""

    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        super().__post_init__()
        if not any(self.init_from.sources.values()):
            raise ConfigError("init_from.path=None: name the run or model to fine-tune, with --init-from.path PATH")
        if self.lora.rank and self.model.tofc is not None:
            raise ConfigError(f"lora.rank={self.lora.rank}: adapters alone do not train the codec (model.tofc); use 0")

    @property
    def adapters(self) -> LoraConfig | None:
        return self.lora if self.lora.rank else None
