"""Recurrent states on a GPU: decodes and convolutions by our Triton kernels, chunks by flash-linear-attention's."""

from __future__ import annotations

from array import array
from math import inf
from typing import Any, NamedTuple

import torch

from engine.cache.state_tensors import StateCache
from engine.recurrent.flash_chunks import Bounds, FlashChunks
from engine.recurrent.recurrences import DELTA, MAMBA2, Arguments, Operator, Recurrence
from engine.recurrent.state_kernels import (
    convolve_decodes_kernel,
    convolve_kernel,
    delta_kernel,
    keep_convolved_kernel,
    mamba2_kernel,
)
from engine.recurrent.states import RecurrentStates, activated
from engine.recurrent.step import on_device
from engine.scheduling.flat_batch import FlatBatch, StepShape

MOST_TAPS = 16
"""The widest convolution: its kernels are written out for each tap."""
_SILU = ("silu", "swish")
# Numbers of a state that one program holds: 32 for each of its threads, while another program's are on their way.
_STATE_NUMBERS = 4096
# Channels of one program of a convolution, 16 bytes of bfloat16 for each thread of a warp, and tokens of one of chunks,
# two for each of four warps: with 16 tokens for one warp, 1 to 2 KB of each thread lie in local memory.
_CHANNELS, _TOKENS = 256, 8


class _Ragged(NamedTuple):
    """A step of chunks on the device: ``starts``, ``lengths`` and ``slots`` of its chunks, the decodes among them, and
    for each token the first one of its chunk and its slot."""

    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    firsts: torch.Tensor
    slots_by_token: torch.Tensor


class TritonStates(RecurrentStates):
    """``RecurrentStates`` by Triton; ``flash`` computes the chunks of prompts whose recurrence it has.

    Decodes launch one kernel for each operator, which knows nothing of the step but tensors that do not move, so that
    they can be recorded. What is of other types or forms than the kernels take is left to torch.
    """

    def __init__(self, cache: StateCache, flash: FlashChunks | None = None) -> None:
        super().__init__(cache)
        self._flash = flash
        self._weights: dict[int, torch.Tensor] = {}  # of each convolution, [width, channels]
        self._ragged: _Ragged | None = None
        self._bounds: Bounds | None = None

    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(batch)
        self._ragged = None if batch.only_decodes else _ragged(batch, self._cache.device)
        has_chunks = self._flash is not None and bool(self._step.prefills)
        self._bounds = Bounds.of(self._step.prefills, self._cache.device) if has_chunks else None

    def capture(self, shape: StepShape) -> None:
        super().capture(shape)
        self._ragged = self._bounds = None

    def convolve(
        self,
        index: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        states, tokens = self._cache.states[index], x[0].T
        (channels, taps), silu = weight.shape, activation in _SILU
        if not 2 <= taps <= MOST_TAPS:
            return super().convolve(index, x, weight, bias, activation)
        if index not in self._weights:
            self._weights[index] = weight.T.contiguous()
        tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
        out = torch.empty(tokens.shape, dtype=x.dtype, device=x.device)
        given = (out, tokens, self._weights[index], out if bias is None else bias, states)
        strides = (tokens.stride(0), states.stride(0))
        options = {"CHANNELS": channels, "TAPS": taps, **convolution_options(channels)}
        more = {"BIASED": bias is not None, "SILU": silu}
        blocks = -(-channels // options["BLOCK"])
        if self._ragged is None:
            convolve_decodes_kernel[(len(tokens), blocks)](*given, self._step.slots, *strides, **options, **more)
        else:
            ragged = self._ragged
            convolve_kernel[(-(-len(tokens) // _TOKENS), blocks)](
                *given,
                ragged.firsts,
                ragged.slots_by_token,
                len(tokens),
                *strides,
                **{**options, **more, **chunk_options()},
            )
            keep_convolved_kernel[(len(ragged.slots), blocks)](
                tokens, states, ragged.starts, ragged.lengths, ragged.slots, *strides, **options
            )
        return activated(out.T.unsqueeze(0), None if silu else activation)

    def decode(self, index: int, recurrence: Recurrence, arguments: Arguments, out: torch.Tensor) -> None:
        if self._cache.states[index].dtype != torch.float32:
            super().decode(index, recurrence, arguments, out)
        elif recurrence is DELTA:
            self._decode_delta(index, arguments, out)
        else:
            assert recurrence is MAMBA2
            self._decode_mamba2(index, arguments, out)

    def prefill(
        self, index: int, recurrence: Recurrence, operator: Operator, arguments: Arguments, out: torch.Tensor
    ) -> None:
        states, bounds, computed = self._cache.states[index], self._bounds, None
        if self._flash is not None and bounds is not None:
            taken = {name: bounds.taken(arguments[name]) for name in recurrence.by_token}
            computed = self._flash.compute(recurrence, {**arguments, **taken}, states[bounds.slots], bounds)
        if bounds is None or computed is None:
            super().prefill(index, recurrence, operator, arguments, out)
            return
        found, last = computed
        bounds.put(out, found)
        states.index_copy_(0, bounds.slots, last.to(states.dtype))

    def _decode_delta(self, index: int, arguments: Arguments, out: torch.Tensor) -> None:
        states, step = self._cache.states[index], self._step
        query, key, value = (_rows(arguments[name]) for name in ("query", "key", "value"))
        beta, gate = (arguments[name].contiguous() for name in ("beta", "g"))
        heads, key_size, value_size = states.shape[1:]
        options = delta_options(heads, key.shape[2], key_size, value_size)
        delta_kernel[(len(step.slots), heads, -(-value_size // options["BLOCK"]))](
            out,
            query,
            key,
            value,
            beta,
            gate,
            states,
            step.slots if step.rows is None else step.rows,
            step.slots,
            query.stride(1),
            key.stride(1),
            value.stride(1),
            states.stride(0),
            key_size**-0.5,
            NORMED=bool(arguments.get("use_qk_l2norm_in_kernel")),
            BY_CHANNEL=gate.ndim == 4,
            PICKED=step.rows is not None,
            **options,
        )

    def _decode_mamba2(self, index: int, arguments: Arguments, out: torch.Tensor) -> None:
        states, step = self._cache.states[index], self._step
        x, writing, reading = (_rows(arguments[name]) for name in ("hidden_states", "B", "C"))
        dt = arguments["dt"] if arguments["dt"].stride(-1) == 1 else arguments["dt"].contiguous()
        skip, bias = arguments.get("D"), arguments.get("dt_bias")
        heads, size, width = states.shape[1:]
        options = mamba2_options(heads, writing.shape[2], size, width)
        mamba2_kernel[(len(step.slots), heads, -(-size // options["BLOCK"]))](
            out,
            x,
            dt,
            arguments["A"],
            writing,
            reading,
            out if skip is None else skip,
            out if bias is None else bias,
            states,
            step.slots if step.rows is None else step.rows,
            step.slots,
            x.stride(1),
            dt.stride(1),
            writing.stride(1),
            reading.stride(1),
            states.stride(0),
            *map(float, arguments.get("dt_limit", (0.0, inf))),
            SKIPS=skip is not None,
            BIASED=bias is not None,
            SOFTPLUS=bool(arguments.get("dt_softplus")),
            PICKED=step.rows is not None,
            **options,
        )


def convolution_options(channels: int) -> dict[str, Any]:
    """What the kernels of a convolution are compiled for beside their sizes."""
    return {"BLOCK": min(_CHANNELS, _power_of_two(channels)), "num_warps": 1}


def chunk_options() -> dict[str, Any]:
    """What ``convolve_kernel`` is compiled for besides."""
    return {"TOKENS": _TOKENS, "num_warps": 4}


def delta_options(heads: int, key_heads: int, key_size: int, value_size: int) -> dict[str, Any]:
    """What ``delta_kernel`` is compiled for."""
    width = _power_of_two(key_size)
    return {
        "HEADS": heads,
        "KEY_HEADS": key_heads,
        "KEY_SIZE": key_size,
        "KEY_WIDTH": width,
        "VALUE_SIZE": value_size,
        "BLOCK": min(_power_of_two(value_size), max(1, _STATE_NUMBERS // width)),
        "num_warps": 4,
    }


def mamba2_options(heads: int, groups: int, size: int, width: int) -> dict[str, Any]:
    """What ``mamba2_kernel`` is compiled for."""
    padded = _power_of_two(width)
    return {
        "HEADS": heads,
        "GROUPS": groups,
        "SIZE": size,
        "BLOCK": min(_power_of_two(size), max(1, _STATE_NUMBERS // padded)),
        "STATE": width,
        "WIDTH": padded,
        "num_warps": 4,
    }


def _ragged(batch: FlatBatch, device: torch.device) -> _Ragged:
    """Brought to the device by one copy."""
    starts, lengths, slots = batch.query_starts, batch.query_lengths, batch.state_slots
    firsts, slots_by_token = array("i"), array("i")
    for start, length, slot in zip(starts, lengths, slots, strict=True):
        firsts.extend(array("i", [start]) * length)
        slots_by_token.extend(array("i", [slot]) * length)
    parts = (starts, lengths, slots, firsts, slots_by_token)
    numbers = on_device(array("i", b"".join(part.tobytes() for part in parts)), device)
    return _Ragged(*numbers.split([len(part) for part in parts]))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[1, tokens, heads, size] whose tokens lie in one piece each, wherever they begin."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1] else tensor.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
