"""Recurrent states on a CPU, in C: each is read and written once a token, where it lies."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch

from engine.cache.state_tensors import StateCache
from engine.native import library
from engine.recurrent.recurrences import DeltaInputs, Inputs
from engine.recurrent.states import RecurrentStates, activated
from engine.recurrent.step import on_device
from engine.scheduling.flat_batch import FlatBatch

MOST_TAPS = 16
"""The widest convolution, as in ``states.h``."""


class NativeStates(RecurrentStates):
    """``RecurrentStates`` with the library ``code``; ``threads`` share the heads of a step.

    What is not in float32 is left to torch.
    """

    def __init__(self, cache: StateCache, code: Any, threads: int) -> None:
        super().__init__(cache)
        self._code = code
        self._pool = code.castor_states_open(threads)
        if not self._pool:
            raise MemoryError("no memory for the threads that advance recurrent states")
        weakref.finalize(self, code.castor_states_close, self._pool)
        self._weights: dict[int, torch.Tensor] = {}  # of each convolution, [width, channels]
        self._starts = self._lengths = self._slots = torch.empty(0, dtype=torch.long)

    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(batch)
        self._starts, self._lengths, self._slots = (
            on_device(numbers, self._cache.device)
            for numbers in (batch.query_starts, batch.query_lengths, batch.state_slots)
        )

    def convolve(
        self,
        index: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        states = self._cache.states[index]
        if {x.dtype, weight.dtype, states.dtype} != {torch.float32} or weight.shape[1] > MOST_TAPS:
            return super().convolve(index, x, weight, bias, activation)
        if index not in self._weights:
            self._weights[index] = weight.T.contiguous()
        tokens = x[0].T.contiguous()
        out = torch.empty_like(tokens)
        step = library.Convolution(
            *map(_address, (tokens, self._weights[index], bias, out, states)),
            *map(_address, (self._starts, self._lengths, self._slots)),
            states.stride(0),
            len(self._slots),
            tokens.shape[1],
            weight.shape[1],
        )
        self._code.castor_convolution(self._pool, ctypes.byref(step))
        return activated(out.T.unsqueeze(0), activation)

    def advance(self, index: int, inputs: Inputs, slots: torch.Tensor) -> torch.Tensor:
        states = self._cache.states[index]
        if states.dtype != torch.float32:
            return super().advance(index, inputs, slots)
        given = [numbers if numbers is None else numbers.contiguous() for numbers in inputs]
        places = (states.stride(0), len(slots))
        if isinstance(inputs, DeltaInputs):
            out = torch.empty_like(inputs.value, memory_format=torch.contiguous_format)
            sizes = (inputs.value.shape[1], *inputs.key.shape[1:], inputs.value.shape[2], inputs.decay.ndim == 3)
            delta = library.Delta(*map(_address, (*given, out, states, slots)), *places, *sizes)
            self._code.castor_delta(self._pool, ctypes.byref(delta))
        else:
            out = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
            sizes = (inputs.x.shape[1], inputs.writing.shape[1], inputs.x.shape[2], inputs.writing.shape[2])
            mamba2 = library.Mamba2(*map(_address, (*given, out, states, slots)), *places, *sizes)
            self._code.castor_mamba2(self._pool, ctypes.byref(mamba2))
        return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
