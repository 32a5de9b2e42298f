"""One file an operator: one replica's function, its reference, stacked kernels, vmap rule."""

import os

# A kernel's multiplies and adds are fused unless its launch says otherwise: Triton's default up to 3.9, not after
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
