"""The recurrences of transformers' mixers: what each is called with, and one step of it for many sequences at once.

A mixer computes several tokens of one sequence by an operator of its own family in chunks; one token is cheaper by the
formula itself. ``state`` is float32 [sequences, heads, …] and is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch.nn import functional

Arguments = Mapping[str, Any]
_L2_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Recurrence:
    """How an operator over several tokens is called: ``operator(**arguments)`` gives the output and the last state.

    ``by_token`` are its arguments that have the tokens as their second axis, [sequences, tokens, …]; ``value`` is the
    one whose shape the output has. ``initial`` and ``final`` are its arguments for the state to begin with and for
    wanting the last one. ``step`` takes the arguments with the tokens taken out, [sequences, …], and the states.
    """

    by_token: frozenset[str]
    value: str
    initial: str
    final: str
    step: Callable[[Arguments, torch.Tensor], torch.Tensor]


def delta_step(arguments: Arguments, state: torch.Tensor) -> torch.Tensor:
    """One token of a gated delta rule (Yang et al., "Gated Delta Networks", 2024), also with a gate for each channel
    (Kimi Team, "Kimi Linear", 2025).

    query, key [n, key heads, key size], value [n, heads, value size], beta [n, heads], g [n, heads] or [n, heads, key
    size], the logarithm of the decay; state [n, heads, key size, value size]. Returns [n, heads, value size] in the
    type of query.
    """
    query, key, value, beta, g = (arguments[name].float() for name in ("query", "key", "value", "beta", "g"))
    if arguments.get("use_qk_l2norm_in_kernel"):
        query = query * torch.rsqrt(query.square().sum(-1, keepdim=True) + _L2_EPSILON)
        key = key * torch.rsqrt(key.square().sum(-1, keepdim=True) + _L2_EPSILON)
    shared = value.shape[1] // key.shape[1]
    query, key = (rows.repeat_interleave(shared, dim=1) for rows in (query, key))
    state *= g.exp().view(*g.shape, *[1] * (4 - g.ndim))
    missing = (value - torch.einsum("nhk,nhkv->nhv", key, state)) * beta.unsqueeze(-1)
    state += key.unsqueeze(-1) * missing.unsqueeze(-2)
    out = torch.einsum("nhk,nhkv->nhv", query * query.shape[-1] ** -0.5, state)
    return out.to(arguments["query"].dtype)


def mamba2_step(arguments: Arguments, state: torch.Tensor) -> torch.Tensor:
    """One token of a state space model with a scalar decay (Dao and Gu, "Transformers are SSMs", 2024).

    hidden_states [n, heads, size], dt [n, heads], B and C [n, groups, state size], A, D, dt_bias [heads]; state [n,
    heads, size, state size]. Returns float32 [n, heads, size].
    """
    x, dt = arguments["hidden_states"].float(), arguments["dt"]
    if arguments.get("dt_bias") is not None:
        dt = dt + arguments["dt_bias"].to(dt.dtype)
    if arguments.get("dt_softplus"):
        dt = functional.softplus(dt)
    dt = dt.clamp(*arguments.get("dt_limit", (0.0, inf))).float()
    shared = x.shape[1] // arguments["B"].shape[1]
    writing, reading = (arguments[name].float().repeat_interleave(shared, dim=1) for name in ("B", "C"))
    state *= (dt * arguments["A"].float()).exp()[..., None, None]
    state += (dt.unsqueeze(-1) * x).unsqueeze(-1) * writing.unsqueeze(-2)
    out = (state * reading.unsqueeze(-2)).sum(-1)
    if arguments.get("D") is not None:
        out += arguments["D"].float().unsqueeze(-1) * x
    return out


_DELTA = Recurrence(
    frozenset({"query", "key", "value", "g", "beta"}), "value", "initial_state", "output_final_state", delta_step
)
_MAMBA2 = Recurrence(
    frozenset({"hidden_states", "dt", "B", "C"}), "hidden_states", "initial_states", "return_final_states", mamba2_step
)

RECURRENCES: Mapping[str, Recurrence] = {
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba2_chunk_scan": _MAMBA2,
}
"""By the name of the operator in the module of a model."""
