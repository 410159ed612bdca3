"""The largest values of each row in a fixed order."""

from __future__ import annotations

import torch


def ranked(values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` largest values of each row, descending, and their columns [rows, width]; equal values by column.

    If ``width`` cuts between equal values, which of them are returned is undefined.
    """
    width = min(width, values.shape[1])
    columns = values.topk(width).indices.sort(dim=-1).values
    best, order = values.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return best, columns.gather(1, order)
