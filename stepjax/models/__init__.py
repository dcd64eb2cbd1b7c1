"""STEP3-VL as flax.nnx modules: Perception Encoder, projector, Qwen3 decoder. Modules are pytrees, run by plain JAX."""

from stepjax.models.step_vl import StepVL, abstract_model, init_model

__all__ = ["StepVL", "abstract_model", "init_model"]
