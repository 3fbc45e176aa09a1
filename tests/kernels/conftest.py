"""The interpreter of GPU kernels runs every warpgroup of a block as a thread that may wait for another one."""

import os

# Read when JAX makes its CPU client. Each waiting warpgroup holds a thread of XLA's pool, which has one per core:
# with two of them both can be waiting, for a third that never gets one.
os.environ.setdefault("NPROC", "16")
