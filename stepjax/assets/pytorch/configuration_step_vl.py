"""STEP3-VL for Transformers: the fields of `config.json`. Exported by stepjax; needs no other file of it."""

from transformers import AutoConfig, PretrainedConfig

# What servers ask for, of variants that this model does not have.
FIXED = {
    "num_channels": 3,
    "use_cls_token": False,
    "use_ln_pre": True,
    "use_ln_post": False,
    "use_abs_posemb": True,
    "use_rope2d": True,
    "pool_type": "none",
    "output_dim": None,
}


class StepRoboticsVisionEncoderConfig(PretrainedConfig):
    """The Perception Encoder ("PE-lang G/14") and its two stride-2 convolutions."""

    model_type = "perception_encoder"
    base_config_key = "vision_config"

    def __init__(
        self,
        width=1536,
        layers=47,
        heads=16,
        mlp_ratio=8960 / 1536,
        patch_size=14,
        image_size=728,  # the learned position table covers (image_size / patch_size)^2 patches
        layer_norm_eps=1e-5,
        rope_theta=10_000.0,
        ls_init_value=0.1,
        hidden_act="quick_gelu",
        **kwargs,
    ):
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.patch_size = patch_size
        self.image_size = image_size
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.ls_init_value = ls_init_value
        self.hidden_act = hidden_act
        for name, value in FIXED.items():
            given = kwargs.pop(name, value)
            if given != value:
                raise ValueError(f"vision_config.{name}={given!r} is not supported: the encoder has {value!r}")
            setattr(self, name, value)
        super().__init__(**kwargs)


class StepRoboticsConfig(PretrainedConfig):
    """The whole model. `text_config` is that of a plain Qwen3 or Llama decoder."""

    model_type = "step_robotics"
    sub_configs = {"vision_config": StepRoboticsVisionEncoderConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_token_id=151679,
        image_token_len=169,  # features of a global view
        patch_token_len=81,  # features of a crop
        understand_projector_stride=2,
        projector_bias=False,
        **kwargs,
    ):
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = StepRoboticsVisionEncoderConfig(**(vision_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            fields = {"model_type": "qwen3", **(text_config or {})}
            text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.image_token_len = image_token_len
        self.patch_token_len = patch_token_len
        self.understand_projector_stride = understand_projector_stride
        self.projector_bias = projector_bias
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def save_pretrained(self, *args, **kwargs):
        # Servers know the model by this name, in whose place Transformers puts the class's.
        self.architectures = ["StepVLForConditionalGeneration"]
        super().save_pretrained(*args, **kwargs)
