"""Accelerator kernels for attention, decoding, sampling and the loss; free of any model's types.

One folder an operation: `reference.py` says in jnp what is computed, `tpu.py` (Mosaic) and `gpu.py` compute it fast,
and the folder's one public function checks its arguments and picks by the `implementation` it is given. Nothing here
asks which devices are present: the program may be compiled for a machine that is not.
"""
