"""Layers that carry a state from token to token: the operators that advance it for the sequences of a step."""
