"""Products by weights in blocks, for models whose layers transformers computes: the C code, one product at a time."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from engine.api.errors import ModelRefused
from engine.native import library
from engine.native.packing import GROUP, KINDS, PANEL, Format, Panels, bytes_in_panels, format_of, pack_blocks, whole
from engine.packed.schemes import Blocks, Scheme


class PanelProduct:
    """Multiplies rows by one matrix, which it holds in panels."""

    dtype = torch.float32

    def __init__(self, products: Products, panels: Panels, channels: int, columns: int) -> None:
        self.panels = panels
        self._products = products
        self.channels, self.columns = channels, columns
        count, size = panels.data.shape
        start = panels.data.data_ptr()
        self._addresses = (ctypes.c_void_p * count)(*range(start, start + count * size, size))
        self._formats = (ctypes.c_uint8 * count)(*[int(panels.format)] * count)
        self._matrix = library.Matrix(self._addresses, self._formats, None, count, columns)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [rows, columns] in float32, end to end: [rows, channels] in float32."""
        if rows.shape[1] != self.columns:
            raise ValueError(f"rows of {rows.shape[1]} numbers do not meet {self.columns} columns")
        out = torch.empty(len(rows), self._matrix.num_panels * PANEL)
        self._products.compute(self._matrix, rows, out)
        return out[:, : self.channels]

    def parts(self, count: int) -> list[PanelProduct] | None:
        """Products by equal shares of the channels, which keep their panels; None where these are no whole panels."""
        if self.channels % (count * PANEL):
            return None
        shares = self.panels.data.chunk(count)
        own = [Panels(data, self.panels.format) for data in shares]
        return [PanelProduct(self._products, panels, self.channels // count, self.columns) for panels in own]


class Kept(Protocol):
    """Panels that an earlier start made; see ``engine.packed.panel_file``."""

    def panels(self, name: str, expected: tuple[Format, int, int], make: Callable[[], Panels]) -> Panels: ...


class Products:
    """Makes products that share the threads of one pool; ``code`` is the library, ``kept`` has panels by name."""

    def __init__(self, code: Any, threads: int, kept: Kept | None = None) -> None:
        self._code = code
        self._kept = kept
        self._pool = code.castor_products_open(threads)
        if not self._pool:
            raise MemoryError("there is no memory, or there are no threads, for products")
        weakref.finalize(self, code.castor_products_close, self._pool)

    def product_of(self, blocks: Blocks, name: str = "") -> PanelProduct | None:
        """What multiplies by a matrix in blocks, by its name in the model; None for what the C code does not know."""
        channels, columns = blocks.shape
        if not knows(blocks.scheme, blocks.shape):
            return None
        if self._kept is None or not name:
            return PanelProduct(self, panels_of(blocks), channels, columns)
        scheme = blocks.scheme
        size = PANEL * (columns // scheme.columns) * bytes_in_panels(scheme.name, scheme.block_bytes)
        expected = format_of(scheme.name), -(-channels // PANEL), size
        try:
            panels = self._kept.panels(name, expected, partial(panels_of, blocks))
        except ModelRefused as refusal:
            raise ModelRefused(f"{name}: {refusal}") from refusal
        return PanelProduct(self, panels, channels, columns)

    def compute(self, matrix: library.Matrix, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Raises ``MemoryError`` where there is none for the activations."""
        if not len(rows):
            return
        given = (ctypes.byref(matrix), rows.data_ptr(), out.data_ptr(), len(rows))
        if self._code.castor_product(self._pool, *given) != 0:
            raise MemoryError(f"no memory for the activations of {len(rows)} rows")


def panels_of(blocks: Blocks) -> Panels:
    """The panels of a matrix in blocks that ``knows``."""
    data = blocks.data.view(len(blocks.data), -1, blocks.scheme.block_bytes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads meet after each of many small steps: where one is paused, all wait
    try:
        return pack_blocks(whole(data), blocks.scheme.name)
    finally:
        torch.set_num_threads(threads)


def knows(scheme: Scheme, shape: tuple[int, ...]) -> bool:
    """Whether the C code multiplies by matrices [..., channels, columns] in the blocks of a scheme."""
    return scheme.name in KINDS and len(shape) > 1 and shape[-1] % GROUP == 0
