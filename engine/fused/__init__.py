"""Rewrites that fuse the operators of models into fewer kernels, and these kernels."""
