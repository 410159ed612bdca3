"""Penalties on the device: counts of tokens in a table, so that nothing waits for them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Batch
from dataclasses import astuple, dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from engine.scheduling.sequence import Sequence

# What an entry of ``CountTable`` gains by a token of the prompt, once, and by each token of the answer.
_IN_PROMPT, _IN_ANSWER = 1, 2


class CountUpdate(NamedTuple):
    """What the host knows and ``CountTable`` does not, as int64 arrays that are to be brought to the device.

    ``rows`` are those of the sequences in question, ``fresh`` those of them that begin at zero; ``amounts`` are to be
    added to the entries ``cells`` of the flat table.
    """

    rows: array[int]
    fresh: array[int]
    cells: array[int]
    amounts: array[int]


@dataclass(slots=True)
class _Counted:
    """The row of a sequence, and how many of its tokens are counted there; -1 before the first."""

    row: int
    end: int = -1


class CountTable:
    """``Penalties`` on the device: the counts of each sequence in a row of a table, int32 [slots, vocabulary].

    A row lives as long as its sequence does; the table grows by powers of two, and goes with the last row. Nothing
    waits for the device.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counted: WeakKeyDictionary[Sequence, _Counted] = WeakKeyDictionary()
        self._table = torch.empty(0, vocab_size, dtype=torch.int32, device=device)

    def missing(self, sequences: Batch[Sequence]) -> CountUpdate:
        """The tokens of ``sequences`` that are not counted yet."""
        update = CountUpdate(array("q"), array("q"), array("q"), array("q"))
        for sequence in sequences:
            if sequence not in self._counted:
                taken = {counted.row for counted in self._counted.values()}
                self._counted[sequence] = _Counted(next(row for row in range(len(taken) + 1) if row not in taken))
            prompt, (row, end) = sequence.request.prompt, astuple(self._counted[sequence])
            first = row * self._table.shape[1]
            update.rows.append(row)
            if not len(prompt) <= end <= len(sequence.tokens):
                # The first time, or tokens were removed.
                update.fresh.append(row)
                end = len(prompt)
                if sequence.request.sampling.repetition_penalty != 1:
                    update.cells.extend(first + token for token in dict.fromkeys(prompt))
                    update.amounts.extend([_IN_PROMPT] * (len(update.cells) - len(update.amounts)))
            update.cells.extend(first + token for token in sequence.tokens[end:])
            update.amounts.extend([_IN_ANSWER] * (len(update.cells) - len(update.amounts)))
        return update

    def entries(self, sequences: Batch[Sequence], update: Batch[torch.Tensor]) -> torch.Tensor:
        """Their counts [sequences, vocabulary], a copy, after the arrays of ``missing``, on the device, are added."""
        rows, fresh, cells, amounts = update
        needed = 1 + max(self._counted[sequence].row for sequence in sequences)
        if needed > len(self._table):
            grown = self._table.new_zeros(1 << (needed - 1).bit_length(), self._table.shape[1])
            grown[: len(self._table)] = self._table
            self._table = grown
        self._table.index_fill_(0, fresh, 0)
        self._table.view(-1).scatter_add_(0, cells, amounts.int())
        # Only here, so that a step that fails before counts nothing.
        for sequence in sequences:
            self._counted[sequence].end = len(sequence.tokens)
        return self._table.index_select(0, rows)

    def release(self) -> None:
        """Give the table's memory back if no sequence with penalties is left."""
        if len(self._table) and not self._counted:
            self._table = self._table[:0].clone()


def penalised(
    scores: torch.Tensor, entries: torch.Tensor, settings: torch.Tensor, pending: torch.Tensor
) -> torch.Tensor:
    """``scores`` [rows, vocabulary] with the numbers of ``Penalties.apply``, from the rows' ``entries``, which change.

    ``settings`` (float64 [rows, 3]) are the repetition, presence and frequency penalties. ``pending`` (int64 [rows, 1])
    are tokens of the answers that the table does not count yet, negative where there is none.
    """
    entries.scatter_add_(1, pending.clamp(min=0), (pending >= 0).int() * _IN_ANSWER)
    counts = entries // _IN_ANSWER
    repetition, presence, frequency = settings[:, :, None].unbind(1)
    factors = repetition.to(scores.dtype)
    scores = torch.where(entries > 0, torch.where(scores < 0, scores * factors, scores / factors), scores)
    amounts = (presence + frequency * counts).masked_fill_(counts == 0, 0)
    return scores - amounts.to(scores.dtype)
