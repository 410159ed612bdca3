"""Advances the states of a model through the steps of many sequences: the path of torch on every device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from engine.cache.state_tensors import StateCache
from engine.device.staging import StagedNumbers
from engine.recurrent.recurrences import Arguments, Inputs, Operator, Recurrence, advance, over_tokens
from engine.recurrent.step import StateStep, on_device, state_step
from engine.scheduling.flat_batch import FlatBatch, StepShape


class RecurrentStates:
    """The states of one model in a ``StateCache``, whose entries are numbered as the model's operators ask for them.

    ``prepare`` comes before the forward of a step, ``keep`` after it. In between, every operator of every layer is
    called once: decodes of all sequences are computed together, each prefill chunk by the model's own operator.
    """

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache
        self._step = StateStep(None, torch.empty(0, dtype=torch.long, device=cache.device), [])
        self._static: StagedNumbers | None = None

    def prepare(self, batch: FlatBatch) -> None:
        """Bring the states of sequences that begin with this step into their slots."""
        self._load(batch)
        self._step = state_step(batch, self._cache.device)

    def _load(self, batch: FlatBatch) -> None:
        if cleared := [target for source, target in batch.state_loads if source is None]:
            self._cache.clear(on_device(array("i", cleared), self._cache.device))
        self._copy([(source, target) for source, target in batch.state_loads if source is not None])

    def reserve(self, max_sequences: int) -> None:
        """Make the buffer of recorded steps of up to ``max_sequences`` decodes."""
        self._static = StagedNumbers(max_sequences, self._cache.device)

    def fill(self, batch: FlatBatch) -> None:
        """``prepare`` for a recorded step: its slots are copied to that buffer."""
        assert self._static is not None, "reserve comes first"
        self._load(batch)
        if batch.state_slots:
            self._static.upload(batch.state_slots)

    def capture(self, shape: StepShape) -> None:
        """Read the slots of a step of this ``shape`` from that buffer, until the next ``prepare``."""
        assert self._static is not None, "reserve comes first"
        self._step = StateStep(None, self._static.numbers[: shape.tokens].long(), [])

    def keep(self, batch: FlatBatch) -> None:
        """Copy the states that are to be kept as they are after this step."""
        self._copy(batch.state_saves)

    def convolve(
        self,
        index: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """A causal convolution of each channel over the tokens of each sequence: x [1, channels, tokens], the same out.

        weight [channels, width], bias [channels] or None; ``activation`` is one of transformers', by name, or None. The
        state is the last ``width - 1`` tokens of x, [width - 1, channels].
        """
        states, step, tokens = self._cache.states[index], self._step, x[0].T
        out = torch.empty_like(tokens)
        if len(step.slots):
            rows = slice(None) if step.rows is None else step.rows
            seen = torch.cat([states[step.slots], tokens[rows].unsqueeze(1)], dim=1)
            states.index_copy_(0, step.slots, seen[:, 1:].to(states.dtype))
            found = (seen.float() * weight.T.float()).sum(1)
            out[rows] = (found if bias is None else found + bias.float()).to(x.dtype)
        for start, stop, slot in step.prefills:
            seen = torch.cat([states[slot], tokens[start:stop]])
            states[slot] = seen[len(seen) - states.shape[1] :]
            out[start:stop] = functional.conv1d(
                seen.T.to(weight.dtype), weight.unsqueeze(1), bias, groups=len(weight)
            ).T
        return activated(out.T.unsqueeze(0), activation)

    def recur(self, index: int, recurrence: Recurrence, operator: Operator, arguments: Arguments) -> torch.Tensor:
        """A recurrence over the tokens of each sequence: arguments by token are [1, tokens, …], as is the output."""
        value = arguments[recurrence.value]
        out = value.new_empty(value.shape, dtype=torch.float32 if recurrence.is_wide else value.dtype)
        if len(self._step.slots):
            self.decode(index, recurrence, arguments, out)
        if self._step.prefills:
            self.prefill(index, recurrence, operator, arguments, out)
        return out

    def decode(self, index: int, recurrence: Recurrence, arguments: Arguments, out: torch.Tensor) -> None:
        """The decodes of ``recur``, into their rows of ``out``."""
        step = self._step
        rows = slice(None) if step.rows is None else step.rows
        taken = {name: arguments[name][0, rows] for name in recurrence.by_token}
        found = self.advance(index, recurrence.inputs({**arguments, **taken}), step.slots)
        out[0, rows] = found.to(out.dtype)

    def prefill(
        self, index: int, recurrence: Recurrence, operator: Operator, arguments: Arguments, out: torch.Tensor
    ) -> None:
        """The chunks of ``recur``, into their rows of ``out``."""
        states = self._cache.states[index]
        for start, stop, slot in self._step.prefills:
            taken = {name: arguments[name][:, start:stop] for name in recurrence.by_token}
            found, last = over_tokens(recurrence, operator, {**arguments, **taken}, states[slot : slot + 1])
            states[slot] = last[0]
            out[:, start:stop] = found

    def advance(self, index: int, inputs: Inputs, slots: torch.Tensor) -> torch.Tensor:
        """One token of the sequences in ``slots``: ``recurrences.advance`` where their states lie."""
        states = self._cache.states[index]
        state = states[slots]
        out = advance(inputs, state)
        states.index_copy_(0, slots, state)
        return out

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            sources, targets = (on_device(array("i", slots), self._cache.device) for slots in zip(*pairs, strict=True))
            self._cache.copy(sources, targets)


def activated(numbers: torch.Tensor, activation: str | None) -> torch.Tensor:
    """``activation`` of ``numbers``, by transformers' name for it."""
    if activation is None:
        return numbers
    out: torch.Tensor = ACT2FN[activation](numbers)
    return out
