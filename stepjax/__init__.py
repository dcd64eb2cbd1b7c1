"""stepjax: train, post-train and serve the STEP3-VL vision-language model in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":  # which imports JAX
        from stepjax.interop.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
