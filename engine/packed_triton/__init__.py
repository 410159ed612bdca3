"""Weights in blocks on a GPU: laid out for it once at the load, and multiplied by kernels that unpack them."""
