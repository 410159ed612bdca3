"""Chunks of prompts by flash-linear-attention, where it is installed: those of all sequences of a step in one call.

Yang et al., "Gated Delta Networks", 2024, and Dao and Gu, "Transformers are SSMs", 2024, in the chunked forms that
Yang and Zhang's library has of them in Triton.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine.recurrent.recurrences import MAMBA2, Arguments, Recurrence, mamba2_inputs
from engine.recurrent.step import Prefill, on_device


class Bounds(NamedTuple):
    """The chunks of a step: ``slots`` [n] of their states, and where they begin and end among their own tokens.

    ``ends`` [n + 1] on the device and ``on_host`` are 0 and the sums of their lengths; the same tensors serve all
    layers of a step, so that what the library derives of them is made once. ``spans`` are their tokens in the step.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    on_host: torch.Tensor
    spans: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, prefills: Sequence[Prefill], device: torch.device) -> Bounds:
        spans: list[tuple[int, int]] = []
        ends = array("i", [0])
        for start, stop, _ in prefills:
            ends.append(ends[-1] + stop - start)
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        slots = on_device(array("i", [prefill.slot for prefill in prefills]), device)
        return cls(slots, on_device(ends, device), torch.tensor(ends, dtype=torch.long), spans)

    def taken(self, numbers: torch.Tensor) -> torch.Tensor:
        """The tokens of the chunks, of all those of a step [1, tokens, …]."""
        parts = [numbers[:, start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def put(self, out: torch.Tensor, found: torch.Tensor) -> None:
        """Write ``found`` [1, tokens of the chunks, …] to its tokens of ``out``."""
        parts = found.split([stop - start for start, stop in self.spans], dim=1)
        for (start, stop), part in zip(self.spans, parts, strict=True):
            out[:, start:stop] = part


class FlashChunks:
    """The library's ``chunk_gated_delta_rule`` and ``chunk_simple_gla``. Raises ``ImportError`` where it is missing."""

    def __init__(self) -> None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla

        self._delta_rule: Any = chunk_gated_delta_rule
        self._linear_attention: Any = chunk_simple_gla

    def compute(
        self, recurrence: Recurrence, arguments: Arguments, states: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A recurrence over the chunks of a step, whose tokens the arguments have end to end.

        Returns the output [1, tokens, …] and the last states [n, …] of sequences that begin with ``states``; None where
        the library has no such recurrence.
        """
        if recurrence is MAMBA2:
            return self._mamba2(arguments, states, bounds)
        return self._delta(arguments, states, bounds) if arguments["g"].ndim == 3 else None

    def _delta(self, arguments: Arguments, states: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """A gated delta rule with one gate for each head."""
        out, last = self._delta_rule(
            arguments["query"],
            arguments["key"],
            arguments["value"],
            g=arguments["g"],
            beta=arguments["beta"],
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=bool(arguments.get("use_qk_l2norm_in_kernel")),
            cu_seqlens=bounds.ends,
            cu_seqlens_cpu=bounds.on_host,
        )
        return out, last

    def _mamba2(self, arguments: Arguments, states: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """A state space model with a scalar decay is linear attention: its keys are what is written, its values the
        inputs times their steps, and its queries what is read."""
        kind, heads = arguments["hidden_states"].dtype, arguments["hidden_states"].shape[2]
        inputs = mamba2_inputs(arguments)
        keys, queries = (
            arguments[name].repeat_interleave(heads // arguments[name].shape[2], dim=2) for name in ("B", "C")
        )
        out, last = self._linear_attention(
            queries,
            keys,
            (inputs.x * inputs.dt.unsqueeze(-1)).to(kind),
            g=inputs.dt * arguments["A"].float(),
            scale=1.0,
            initial_state=states,
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=bounds.ends,
            cu_seqlens_cpu=bounds.on_host,
        )
        out = out.float()
        return (out if inputs.skip is None else out + inputs.skip.unsqueeze(-1) * inputs.x), last
