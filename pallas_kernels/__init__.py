"""Accelerator kernels for attention, decoding and sampling, independent of any model.

One folder per operation. `reference.py` defines the operation in jnp; `tpu.py` (Mosaic), `gpu.py` and `xla.py` compute
it fast. The folder's one public function checks its arguments and dispatches on `implementation`. Nothing here depends
on the devices present, so programs can be compiled ahead of time without them.
"""
