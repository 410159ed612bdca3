"""GPTQ, AWQ and AutoRound: digits in words of int32, inputs above one another."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from engine.api.errors import ModelRefused
from engine.packed.schemes import Blocks
from engine.quantised.names import grouped
from engine.quantised.packing import INT4, INT8, Grid, bits_of, order_of, packed, scales_of
from engine.quantised.settings import Settings, damaged

_ENDINGS = {rf"(.+)\.{role}": (r"\1.weight", role) for role in ("qweight", "qzeros", "scales", "g_idx")}
_NEEDED = ("qweight", "qzeros", "scales")
_AUTOROUND = (
    "auto_round:auto_gptq", "auto_round:gptq", "auto_round", "auto_round:gptqmodel",
    "auto_round:auto_awq", "auto_round:awq",
)  # fmt: skip


class Gptq:
    """``qweight`` [inputs * bits / 32, outputs] and ``qzeros`` [groups, outputs * bits / 32], streams of digits;
    ``scales`` [groups, outputs]; ``g_idx`` [inputs], the group of each input. (digit - zero) * scale.

    ``is_less_one``: stored zeros are one less, modulo their range (the first version of the format, in the field's
    words ``gptq``; the second is ``gptq_v2``). Bits are seen by the shapes, which may differ from module to module.
    """

    def __init__(self, name: str, is_less_one: bool) -> None:
        self.name = name
        self._is_less_one = is_less_one

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return grouped(self.name, names, _ENDINGS, _NEEDED)

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        words, zeros, scales = _matrices(self.name, parts)
        groups, outputs = scales.shape
        bits = zeros.shape[1] * 32 // outputs
        if not 2 <= bits <= 8 or zeros.shape != (groups, outputs * bits // 32) or words.shape[0] * 32 % bits:
            raise _misfit(self.name, words, zeros, scales)
        inputs = words.shape[0] * 32 // bits
        if words.shape[1] != outputs or groups > inputs:
            raise _misfit(self.name, words, zeros, scales)
        found = bits_of(zeros, bits, outputs).T.short()
        if self._is_less_one:
            found = found + 1 & (1 << bits) - 1
        size, order = inputs // groups, None
        if "g_idx" not in parts and inputs % groups:
            raise _misfit(self.name, words, zeros, scales)
        if "g_idx" in parts:
            if parts["g_idx"].shape != (inputs,):
                raise damaged(self.name, f"g_idx {list(parts['g_idx'].shape)} does not fit {inputs} inputs")
            order = order_of(self.name, parts["g_idx"], groups)
            size = int((parts["g_idx"] == 0).sum())

        def digits(part: slice) -> torch.Tensor:
            rows = bits_of(words[:, part].contiguous().T, bits, inputs)
            rows = rows if order is None else rows[:, order]
            return (rows ^ 128).view(torch.int8) if bits == 8 else rows

        zero = Grid(found - 128 if bits == 8 else found, 1, size, outputs)
        scale = scales_of(self.name, scales.T, (outputs, inputs), [(1, size)])
        return packed(INT8 if bits > 4 else INT4, (outputs, inputs), digits, scale, zero, order)


class Awq:
    """``qweight`` [inputs, outputs / 8], ``qzeros`` [groups, outputs / 8], eight digits of four bits in a word, their
    columns interleaved; ``scales`` [groups, outputs]. (digit - zero) * scale. The layout ``gemm`` of AutoAWQ."""

    def __init__(self, name: str) -> None:
        self.name = name

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return grouped(self.name, names, _ENDINGS, _NEEDED)

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        words, zeros, scales = _matrices(self.name, parts)
        (inputs, packed_outputs), (groups, outputs) = words.shape, scales.shape
        if outputs != 8 * packed_outputs or zeros.shape != (groups, packed_outputs) or inputs % groups:
            raise _misfit(self.name, words, zeros, scales)

        def digits(part: slice) -> torch.Tensor:
            return _disentangled(words[:, part.start // 8 : part.stop // 8])

        size = inputs // groups
        scale = scales_of(self.name, scales.T, (outputs, inputs), [(1, size)])
        return packed(INT4, (outputs, inputs), digits, scale, Grid(_disentangled(zeros), 1, size, outputs))


def method_of_autoround(settings: Settings) -> Gptq | Awq:
    """AutoRound's own names for the layouts of the others."""
    settings.one_of("data_type", ("int", "int_sym", "int_asym"), "int")
    layout = settings.one_of("packing_format", _AUTOROUND, "auto_round:auto_gptq")
    name = f"AutoRound, {layout}"
    if "awq" in layout:
        settings.one_of("bits", (4,), 4)
        return Awq(name)
    return Gptq(name, is_less_one="auto_gptq" in layout or layout.endswith(":gptq"))


def _matrices(method: str, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    words, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    if (words.dtype, zeros.dtype) != (torch.int32, torch.int32):
        raise damaged(method, f"qweight and qzeros are {words.dtype} and {zeros.dtype}, not int32")
    if not words.ndim == zeros.ndim == scales.ndim == 2 or not words.numel() or not scales.numel():
        raise _misfit(method, words, zeros, scales)
    return words, zeros, scales


def _misfit(method: str, words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> ModelRefused:
    sizes = ", ".join(
        f"{what} {list(one.shape)}" for what, one in (("qweight", words), ("qzeros", zeros), ("scales", scales))
    )
    return damaged(method, f"{sizes} do not fit together")


def _disentangled(words: torch.Tensor) -> torch.Tensor:
    """AWQ's digits [outputs, rows] of words [rows, outputs / 8]: a word has its four even outputs first."""
    rows, count = words.shape
    digits = bits_of(words.contiguous().T, 4, 8 * rows).view(count, rows, 2, 4)
    return digits.permute(0, 3, 2, 1).reshape(8 * count, rows)
