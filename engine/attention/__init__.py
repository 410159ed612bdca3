"""Attention over the paged cache: the contract (base), the seam into transformers models, the backends."""
