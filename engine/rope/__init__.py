"""Rotary embeddings that rotate a long text otherwise than a short one: each token of a step by its own frequencies."""
