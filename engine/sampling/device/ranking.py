"""The largest values of each row in a fixed order."""

from __future__ import annotations

import torch


def ranked(values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` largest values of each row, descending, and their columns [rows, width]; equal values by column.

    If ``width`` cuts between equal values, which of them are returned is undefined.
    """
    return in_order(*values.topk(min(width, values.shape[1]), sorted=False))


def in_order(values: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of each row, the largest value first, equal values by column."""
    columns, order = columns.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)
