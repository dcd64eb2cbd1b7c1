"""STEP3-VL as flax.nnx modules: Perception Encoder, projector, Qwen3 decoder. Modules are pytrees, run by plain JAX."""
