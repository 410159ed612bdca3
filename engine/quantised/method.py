"""What a method of quantisation says of a checkpoint: which tensors are one weight, and which blocks they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from engine.packed.schemes import Blocks


class Method(Protocol):
    """How a checkpoint stores its quantised weights."""

    name: str  # in words, for logs and refusals: "FP8 in blocks of 128 x 128"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """The quantised weights among the tensors of a checkpoint: the name of each as it would be without
        quantisation, to its parts: {"model.layers.0.mlp.down_proj.weight": {"weight": "…weight", "scale":
        "…weight_scale_inv"}}. Tensors that have no meaning for the numbers (activation scales, say) are parts with the
        role "ignored"."""

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        """The weight [rows, columns] or [experts, rows, columns] of these parts: in blocks, or where no scheme holds
        it, its numbers in float32 (rows are outputs in both cases, as in ``nn.Linear``). Raises ``ModelRefused`` for
        parts that are damaged or of shapes that do not fit together."""
