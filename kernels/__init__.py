"""One file an operator: one replica's function, its reference, stacked kernels, vmap rule."""
