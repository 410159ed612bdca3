"""The recurrences of transformers' mixers: what each is called with, and one step of it for many sequences at once.

A mixer computes several tokens of one sequence by an operator of its own family in chunks; one token is cheaper by the
formula itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch.nn import functional

Arguments = Mapping[str, Any]
Operator = Callable[..., Any]
_L2_EPSILON = 1e-6


class DeltaInputs(NamedTuple):
    """One token of ``n`` sequences for a gated delta rule, in float32.

    query, key [n, key heads, key size], with the scale and the norm that they get; value [n, heads, value size]; beta
    [n, heads]; decay [n, heads], or with a gate for each channel [n, heads, key size].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor


class Mamba2Inputs(NamedTuple):
    """One token of ``n`` sequences for a state space model, in float32.

    x [n, heads, size]; dt, decay [n, heads]; writing, reading [n, groups, width]; skip [heads] or None.
    """

    x: torch.Tensor
    dt: torch.Tensor
    decay: torch.Tensor
    writing: torch.Tensor
    reading: torch.Tensor
    skip: torch.Tensor | None


Inputs = DeltaInputs | Mamba2Inputs


@dataclass(frozen=True, slots=True)
class Recurrence:
    """How an operator over several tokens is called: ``operator(**arguments)`` gives the output and the last state.

    ``by_token`` are its arguments that have the tokens as their second axis, [sequences, tokens, …]; ``value`` is the
    one whose shape the output has, which ``is_wide`` if it is float32 whatever the inputs are. ``initial`` and
    ``final`` are its arguments for the state to begin with and for wanting the last one. ``inputs`` makes those of one
    token from the arguments with the tokens taken out.
    """

    by_token: frozenset[str]
    value: str
    initial: str
    final: str
    is_wide: bool
    inputs: Callable[[Arguments], Inputs]


def over_tokens(recurrence: Recurrence, operator: Operator, arguments: Arguments, state: torch.Tensor | None) -> Any:
    """The output of an operator for arguments [sequences, tokens, …], and the last state; None begins with zeros.

    Operators pad to whole chunks: one that is told how large these are need not pad a short text to a long one.
    """
    given = {**arguments, recurrence.initial: state, recurrence.final: True}
    if "chunk_size" in arguments:
        tokens = arguments[recurrence.value].shape[1]
        given["chunk_size"] = min(arguments["chunk_size"], 1 << (tokens - 1).bit_length())
    return operator(**given)


def delta_inputs(arguments: Arguments) -> DeltaInputs:
    """Those of a gated delta rule (Yang et al., "Gated Delta Networks", 2024), also with a gate for each channel (Kimi
    Team, "Kimi Linear", 2025). g is the logarithm of the decay."""
    query, key, value, beta, g = (arguments[name].float() for name in ("query", "key", "value", "beta", "g"))
    if arguments.get("use_qk_l2norm_in_kernel"):
        query, key = (rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + _L2_EPSILON) for rows in (query, key))
    return DeltaInputs(query * query.shape[-1] ** -0.5, key, value, beta, g.exp())


def mamba2_inputs(arguments: Arguments) -> Mamba2Inputs:
    """Those of a state space model with a scalar decay (Dao and Gu, "Transformers are SSMs", 2024)."""
    dt = arguments["dt"]
    if arguments.get("dt_bias") is not None:
        dt = dt + arguments["dt_bias"].to(dt.dtype)
    if arguments.get("dt_softplus"):
        dt = functional.softplus(dt)
    dt = dt.clamp(*arguments.get("dt_limit", (0.0, inf))).float()
    x, writing, reading = (arguments[name].float() for name in ("hidden_states", "B", "C"))
    skip = arguments.get("D")
    decay = (dt * arguments["A"].float()).exp()
    return Mamba2Inputs(x, dt, decay, writing, reading, None if skip is None else skip.float())


def advance(inputs: Inputs, state: torch.Tensor) -> torch.Tensor:
    """Compute one token of each sequence: changes ``state`` in place, and returns float32 [n, heads, size of value].

    ``state`` is float32 [n, heads, key size, value size] for a delta rule, else [n, heads, size, width].
    """
    if isinstance(inputs, DeltaInputs):
        shared = inputs.value.shape[1] // inputs.key.shape[1]
        query, key = (rows.repeat_interleave(shared, dim=1) for rows in (inputs.query, inputs.key))
        state *= inputs.decay.view(*inputs.decay.shape, *[1] * (4 - inputs.decay.ndim))
        missing = (inputs.value - torch.einsum("nhk,nhkv->nhv", key, state)) * inputs.beta.unsqueeze(-1)
        state += key.unsqueeze(-1) * missing.unsqueeze(-2)
        return torch.einsum("nhk,nhkv->nhv", query, state)
    shared = inputs.x.shape[1] // inputs.writing.shape[1]
    writing, reading = (rows.repeat_interleave(shared, dim=1) for rows in (inputs.writing, inputs.reading))
    state *= inputs.decay[..., None, None]
    state += (inputs.dt.unsqueeze(-1) * inputs.x).unsqueeze(-1) * writing.unsqueeze(-2)
    out = (state * reading.unsqueeze(-2)).sum(-1)
    return out if inputs.skip is None else out + inputs.skip.unsqueeze(-1) * inputs.x


DELTA = Recurrence(
    by_token=frozenset({"query", "key", "value", "g", "beta"}),
    value="value",
    initial="initial_state",
    final="output_final_state",
    is_wide=False,
    inputs=delta_inputs,
)
MAMBA2 = Recurrence(
    by_token=frozenset({"hidden_states", "dt", "B", "C"}),
    value="hidden_states",
    initial="initial_states",
    final="return_final_states",
    is_wide=True,
    inputs=mamba2_inputs,
)

RECURRENCES: Mapping[str, Recurrence] = {
    "torch_chunk_gated_delta_rule": DELTA,
    "chunk_kimi_delta_attention": DELTA,
    "mamba2_chunk_scan": MAMBA2,
}
"""By the name of the operator in the module of a model."""
