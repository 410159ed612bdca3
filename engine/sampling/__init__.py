"""Chooses the next tokens of a batch. This is the order, and the only place that states it:

1. raw log-softmax in float32, kept for the rows that report logprobs (``logprobs``);
2. constraints: a token that the row's mask lacks gets a probability of zero (``constraints``);
3. repetition penalty over the tokens of prompt and answer, then presence and frequency penalties over those of the
   answer (``penalties``, ``token_counts``);
4. temperature: 0 takes the most likely token, the one with the lowest id among equals (``filters``);
5. top_k, then top_p over what top_k left, then min_p (``filters``): the order of transformers;
6. one uniform number from (seed, candidate, position) through the inverse of the cumulative distribution
   (``noise``, ``draw``).

``BatchSampler`` computes them when it is called. ``DeviceSampler`` launches them on a GPU and reads the tokens later
(``device_sampler``, ``device_draw``); its tokens are the same.

A row's result depends on that row alone. Tensors are made only for features that a row of the batch uses, and the
logits handed in are never written to.
"""

from __future__ import annotations

from engine.sampling.device_sampler import DeviceSampler
from engine.sampling.sampler import BatchSampler

__all__ = ["BatchSampler", "DeviceSampler"]
