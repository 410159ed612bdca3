"""Weights that stay in the blocks of their file: what blocks mean, and the layers that compute with them."""
