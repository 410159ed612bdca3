"""The method ``bitsandbytes``: tables of 16 numbers (NF4, FP4), also with scales in 8 bits, and LLM.int8()."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.packed.published_schemes import FP4, NF4
from engine.packed.schemes import Blocks, Scheme
from engine.quantised.names import IGNORED, grouped
from engine.quantised.packing import INT8, as_nibbles, bits_of, bytes_of, packed, rows_of, runs, scales_of
from engine.quantised.settings import Settings, damaged

_ENDINGS = {
    **{rf"(.+)\.{role}": (r"\1", role) for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)": (r"\1", "state"),
    r"(.+)\.SCB": (r"\1.weight", "scale"),
    r"(.+)\.weight_format": (r"\1.weight", "layout"),
}
_SCHEMES = {"nf4": NF4, "fp4": FP4}
_MAX_STATE = 1 << 16


class BitsAndBytes:
    """4 bits: ``weight``, bytes of two neighbours, the first in the high bits, over the whole weight end to end; each
    stands for a number of ``quant_map`` times ``absmax`` of a block. Nested: ``absmax`` in bytes, which stand for
    numbers of ``nested_quant_map`` times ``nested_absmax``, plus an offset. ``quant_state`` has the sizes, as JSON.

    8 bits: ``weight`` in int8 and ``SCB``, the largest number of each row, which 127 stands for.
    """

    def __init__(self, settings: Settings) -> None:
        kind = settings.one_of("bnb_4bit_quant_type", _SCHEMES, "fp4")
        self.name = "bitsandbytes, 8 bits" if settings.found.get("load_in_8bit") else f"bitsandbytes, {kind}"

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        found = grouped(self.name, names, _ENDINGS, ("weight",))
        for weight, parts in found.items():
            if parts.keys() == {"weight", "layout"}:  # not quantised, but asked
                parts[IGNORED] = parts.pop("layout")
            elif not ({"absmax", "state"} <= parts.keys() or "scale" in parts):
                raise damaged(self.name, f"{weight} lacks its absmax, quant_state or SCB")
        return found

    def read(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        return self._rows(parts) if "scale" in parts else self._table(parts)

    def _rows(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        weight, scale = parts["weight"], parts["scale"]
        if "layout" in parts and parts["layout"].any():
            raise damaged(self.name, f"weight_format {parts['layout'].tolist()}, only rows (0) are known")
        rows = rows_of(self.name, weight)
        if weight.dtype != torch.int8 or scale.numel() != len(rows) or not scale.is_floating_point():
            raise damaged(self.name, f"SCB {list(scale.shape)} does not fit {weight.dtype} {list(weight.shape)}")
        scales = scales_of(self.name, scale.float().view(*weight.shape[:-1], 1) / 127, weight.shape)
        return packed(INT8, weight.shape, lambda part: rows[part], scales)

    def _table(self, parts: Mapping[str, torch.Tensor]) -> Blocks | torch.Tensor:
        state = self._state(parts["state"])
        shape, size = state["shape"], state["blocksize"]
        total, columns = math.prod(shape), shape[-1]
        pairs = bytes_of(parts["weight"])
        if len(pairs) != -(-total // 2) or parts["absmax"].numel() != -(-total // size):
            raise damaged(
                self.name,
                f"{len(pairs)} bytes and {parts['absmax'].numel()} scales do not fit a weight {shape}, {size} a block",
            )
        scales, table = self._scales(parts, state), parts.get("quant_map")
        if table is not None and (table.shape != (16,) or not table.is_floating_point()):
            raise damaged(self.name, f"quant_map is {table.dtype} {list(table.shape)}")
        scheme = _SCHEMES[state["quant_type"]]
        # Blocks go on over the ends of rows; ours do not, so rows must be whole.
        if columns % 64 == 0 and size % 64 == 0 and (table is None or torch.equal(table.float(), _table_of(scheme))):
            data = torch.empty(total // columns, scheme.row_bytes(columns), dtype=torch.uint8)
            scales = scales.repeat_interleave(size // 64)[: total // 64].view(-1, columns // 64, 1)
            rows = pairs.view(-1, columns // 2)
            for part in runs(len(rows), columns):
                digits = bits_of(_swapped(rows[part]), 4, columns).reshape(-1, 64)
                blocks = torch.cat([bytes_of(scales[part]).view(-1, 4), as_nibbles(digits)], dim=1)
                data[part] = blocks.view(-1, data.shape[1])
            return Blocks(data.view(*shape[:-1], -1), scheme)
        digits = bits_of(_swapped(pairs.unsqueeze(0)), 4, total)[0]
        known = _table_of(scheme) if table is None else table.float()
        return (known[digits.long()] * scales.repeat_interleave(size)[:total]).view(shape)

    def _scales(self, parts: Mapping[str, torch.Tensor], state: dict[str, Any]) -> torch.Tensor:
        """The largest number of each block, in float32."""
        stored: torch.Tensor = parts["absmax"].flatten()
        if stored.dtype == torch.uint8:
            size = state.get("nested_blocksize")
            known = type(size) is int and size > 0 and isinstance(state.get("nested_offset"), float | int)
            if not known or not {"nested_absmax", "nested_quant_map"} <= parts.keys():
                raise damaged(self.name, "absmax is in bytes, and what they stand for is missing")
            numbers, of_blocks = parts["nested_quant_map"].flatten(), parts["nested_absmax"].flatten()
            is_data = numbers.is_floating_point() and of_blocks.is_floating_point()
            if not is_data or numbers.numel() != 256 or of_blocks.numel() != -(-stored.numel() // size):
                raise damaged(self.name, "nested_absmax or nested_quant_map do not fit absmax")
            each = of_blocks.float().repeat_interleave(size)[: stored.numel()]
            stored = numbers.float()[stored.long()] * each + state["nested_offset"]
        if not stored.is_floating_point() or not stored.isfinite().all():
            raise damaged(self.name, "a scale is no finite number")
        return stored.float()

    def _state(self, stored: torch.Tensor) -> dict[str, Any]:
        """JSON in bytes, as far as it is needed."""
        try:
            if stored.dtype != torch.uint8 or stored.numel() > _MAX_STATE:
                raise ValueError("no short text")
            found: dict[str, Any] = json.loads(bytes(stored.tolist()))
            shape, size = found["shape"], found["blocksize"]
            if found["quant_type"] not in _SCHEMES or not all(type(one) is int and one > 0 for one in (*shape, size)):
                raise ValueError(f"{found['quant_type']}, {shape} in blocks of {size}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(self.name, f"quant_state cannot be read ({error})") from error
        return found


def _swapped(pairs: torch.Tensor) -> torch.Tensor:
    return pairs << 4 | pairs >> 4


def _table_of(scheme: Scheme) -> torch.Tensor:
    """The numbers of all 16 digits."""
    one = torch.tensor([[1.0]]).view(torch.uint8)
    digits = as_nibbles(torch.arange(64, dtype=torch.uint8).view(1, -1) & 15)
    return scheme.unpack(torch.cat([one, digits], dim=1))[0, :16]
