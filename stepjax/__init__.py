"""stepjax: train, post-train and serve the STEP3-VL vision-language model in JAX."""

__version__ = "0.1.0"
