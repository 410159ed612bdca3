"""Attention over the paged cache: the contract (base) and the backends."""
