"""Accelerator kernels for attention, decoding and sampling; they know no model's types.

One folder per operation. `reference.py` defines in jnp what is computed; `tpu.py` (Mosaic), `gpu.py` and `xla.py`
compute it fast. The folder's one public function checks its arguments and picks by `implementation`. Nothing here asks
which devices are present: programs may be compiled ahead of time, on a machine without them.
"""
