"""Chooses the next tokens of a batch. This is the order, and the only place that states it:

1. raw log-softmax in float32, kept for the rows that report logprobs (``logprobs``);
2. constraints: a token that the row's mask lacks gets a probability of zero (``constraints``);
3. repetition penalty over the tokens of prompt and answer, then presence and frequency penalties over those of the
   answer (``penalties``, ``token_counts``);
4. temperature: 0 takes the most likely token, the one with the lowest id among equals (``draw``);
5. top_k, then top_p over what top_k left, then min_p (``draw``): the order of transformers;
6. one uniform number from (seed, candidate, position) through the inverse of the cumulative distribution
   (``noise``, ``draw``).

``BatchSampler`` computes them with NumPy, when it is called. ``device.DeviceSampler`` launches them on a GPU with torch
and reads the tokens later; its tokens are the same, but for draws that fall on a border between two tokens by rounding.

A row's result depends on that row alone. Arrays are made only for features that a row of the batch uses, and the
logits handed in are never written to.
"""

from __future__ import annotations

from engine.sampling.sampler import BatchSampler

__all__ = ["BatchSampler"]
