"""Attention in float64, and how far a computation in float32 may lie from it.

The bounds are those of N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter 3. With the
unit roundoff u, n roundings change a result by a factor of at most 1 + gamma(n), gamma(n) = n u / (1 - n u), lemma 3.1,
and an inner product, in whatever order it is added up, by at most gamma(n) |x| |y| (3.5).
"""

from __future__ import annotations

import torch

from engine.attention.base import AttentionOptions

U = 2.0**-24
"""The unit roundoff of float32, in which both backends add up, whatever type their numbers come in."""


def gamma(operations: int) -> float:
    return operations * U / (1 - operations * U)


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the queries of a sequence [tokens, heads, size] at ``start`` take from its keys and values [keys, kv heads,
    size], in float64, and the largest error of each number: [tokens, heads, value size] both."""
    dtype, size = query.dtype, query.shape[2]
    tokens, number = query.shape[0], keys.shape[0]
    q = query.double().unflatten(1, (keys.shape[1], -1))
    k, v = keys.double(), values.double()
    scores = torch.einsum("tkgd,nkd->tkgn", q, k) * options.scaling
    # Products, their sum and the scaling, which is itself rounded.
    error = gamma(size + 2) * torch.einsum("tkgd,nkd->tkgn", q.abs(), k.abs()) * options.scaling
    if options.softcap is not None:
        # No slope of tanh is over 1. Its formula by exp is a difference from 1 of a number with a few roundings.
        scores = options.softcap * torch.tanh(scores / options.softcap)
        error = error + 16 * U * options.softcap
    asking, asked = torch.arange(start, start + tokens)[:, None, None, None], torch.arange(number)
    seen = asked <= asking
    if options.sliding_window is not None:
        seen = seen & (asked > asking - options.sliding_window)
    if options.chunk_size is not None:
        seen = seen & (asked // options.chunk_size == asking // options.chunk_size)
    scores, error = scores.masked_fill(~seen, -torch.inf), error * seen
    # A sink is a score more, without a value.
    sinks = torch.full(q.shape[1:3], -torch.inf) if options.sinks is None else options.sinks.view(q.shape[1:3])
    scores = torch.cat([scores, sinks.double().expand(tokens, -1, -1)[..., None]], dim=-1)
    error = torch.cat([error, torch.zeros_like(scores[..., :1])], dim=-1)
    values_and_none = torch.cat([v, torch.zeros_like(v[:1])])
    weights = scores.softmax(dim=-1)
    # Into powers of two (the factor is rounded, and the product), less the maximum, which grows from tile to tile: each
    # rounding is in proportion to a score. An absolute error of a score is a relative one of its weight.
    sizes = scores.abs().masked_fill(scores.isinf(), 0)
    error = torch.expm1(error + 4 * U * (sizes + sizes.amax(dim=-1, keepdim=True)))
    # Each key is added to a sum, and each tile of 16 keys or more brings an exponential and a product more; the weights
    # are rounded to the type of the values before they meet them.
    error = error + gamma(2 * number + 16) + _roundoff(dtype)
    mixed = torch.einsum("tkgn,nkd->tkgd", weights, values_and_none)
    of_values = torch.einsum("tkgn,nkd->tkgd", weights * error, values_and_none.abs())
    of_total = (weights * error).sum(dim=-1, keepdim=True)
    largest = torch.einsum("tkgn,nkd->tkgd", weights, values_and_none.abs())
    # A quotient of sums: (a + da) / (b + db) differs by no more than this. Weights that the type cannot hold become 0.
    bound = (of_values + of_total * largest) / (1 - of_total) + _smallest(dtype) * v.abs().sum(dim=0)[:, None]
    bound = bound + _roundoff(dtype) * (mixed.abs() + bound)
    return mixed.flatten(1, 2), bound.flatten(1, 2)


def assert_within(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Whether each number is as near to the exact one as its arithmetic has to bring it."""
    error = (found.double() - exact).abs()
    shares = (error / bound)[~(error <= bound)].tolist()
    assert not shares, f"{len(shares)} of {error.numel()} numbers are wrong, by up to {max(shares):.3g} bounds"


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _smallest(dtype: torch.dtype) -> float:
    """The distance of the smallest numbers of a type."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
