"""Operators of models in fewer, faster kernels: rewrites that are proved equal at load, and what they put in place."""
