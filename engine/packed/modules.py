"""Layers whose weights stay in blocks, in the place of those of an unmodified model.

A module keeps its class and its own ``forward``; only what its base class does with ``weight`` is replaced. So an
embedding that scales its rows still does, and a subclass of ``nn.Linear`` that transforms its input too. Who asks such
a module for its ``weight`` gets the numbers, which are unpacked when they are computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._pytree import tree_map

from engine.packed.schemes import Blocks


class Stored(Protocol):
    """A weight of a checkpoint, by the name that the model has for it."""

    def blocks(self) -> Blocks | None:
        """Its blocks, if it can stay in them; of the file where nothing is done to them, else made for the moment."""

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Its numbers."""

    def shape(self) -> torch.Size:
        """The shape of its numbers."""


class Product(Protocol):
    """Multiplies by a matrix."""

    dtype: torch.dtype
    """The type of the rows that it takes and gives."""

    def __call__(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Rows [rows, columns], end to end, by the matrix: [rows, channels], without bias."""


@runtime_checkable
class Divisible(Product, Protocol):
    """A product that can be taken apart."""

    def parts(self, count: int) -> Sequence[Product] | None:
        """Products by equal shares of its channels, in their order; None where the channels do not divide so."""


class MakeProduct(Protocol):
    """Makes what multiplies by blocks [channels, bytes of a row], by the matrix's name in the model."""

    def __call__(self, blocks: Blocks, name: str = "", /) -> Product | None:
        """None for blocks that it does not know."""


class _Numbers(torch.Tensor):  # type: ignore[misc]  # torch is read without its types
    """What blocks stand for. Who asks for the type, the device or the shape alone has nothing unpacked.

    Embeddings that scale their rows do so, in each forward, for the type of a factor.
    """

    @staticmethod
    def __new__(cls, held: Blocks | Matrix, shape: tuple[int, int], dtype: torch.dtype) -> _Numbers:
        made: _Numbers = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=held.device)
        return made

    def __init__(self, held: Blocks | Matrix, _shape: tuple[int, int], _dtype: torch.dtype) -> None:
        self._held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), keywords: Any = None) -> Any:
        def unpacked(value: Any) -> Any:
            return value._held.unpacked(value.dtype) if isinstance(value, cls) else value

        args, keywords = tree_map(unpacked, (args, keywords or {}))
        return function(*args, **keywords)


class Matrix(Product, Protocol):
    """A matrix on a device: a product, which gathers the columns of its input itself, and its own rows."""

    @property
    def device(self) -> torch.device: ...

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows: [len(numbers), columns]."""

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Its numbers, on the device."""


@runtime_checkable
class Stack(Protocol):
    """The matrices of experts on a device."""

    dtype: torch.dtype

    def __getitem__(self, expert: int, /) -> Product: ...

    def plan(self, places: torch.Tensor) -> Any:
        """What the products by all experts need to know of slots [slots], which name their expert."""

    def __call__(self, rows: torch.Tensor, plan: Any, /) -> torch.Tensor:
        """Slots [slots, channels] of rows [tokens or slots, columns], each by its expert's matrix; zeros without."""


@runtime_checkable
class OnDevice(Protocol):
    """A ``MakeProduct`` that keeps weights on a device in a layout of its own. Equal weights share theirs."""

    def __call__(self, blocks: Blocks, name: str = "", /) -> Product | None: ...

    def matrix_of(self, stored: Stored) -> Matrix | None:
        """The matrix of a weight; None for what it does not know."""

    def stack_of(self, stored: Stored) -> Stack | None:
        """The matrices of experts; None for what it does not know."""


class _Packed(nn.Module):  # type: ignore[misc]  # torch is read without its types
    """What linear maps and embeddings in blocks have in common."""

    packed: dict[str, Stored]
    on_device: Matrix | None = None
    """The weight, where a device has it in a layout of its own."""
    kept_dtype: torch.dtype
    is_loading: bool

    @property
    def blocks(self) -> Blocks:
        found = self.packed["weight"].blocks()
        assert found is not None  # or the module would not be packed
        return found

    @property
    def weight(self) -> torch.Tensor:
        if self.is_loading:  # transformers fills what it takes for missing: nothing is unpacked for that
            return torch.empty(shape_of(self), device="meta")
        return _Numbers(self.blocks if self.on_device is None else self.on_device, shape_of(self), self.kept_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.blocks.scheme.name}"


class PackedLinear(_Packed, nn.Linear):  # type: ignore[misc]
    """Multiplies by ``product``. ``order``, where it is set, is how its input is gathered before."""

    product: Product
    order: torch.Tensor | None

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        rows = source.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        found = self.product(rows.to(self.product.dtype).contiguous()).to(source.dtype)
        if self.bias is not None:
            found += self.bias
        return found.reshape(*source.shape[:-1], self.out_features)


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[misc]
    """Unpacks the rows of the tokens that are asked for. ``as_product`` makes what multiplies by its weight."""

    table: Any
    """What has its rows: ``Blocks`` on a CPU, a ``Matrix`` on another device."""
    as_product: Callable[[], Product | None]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.table.rows(tokens.reshape(-1).long()).to(self.kept_dtype)
        return rows.view(*tokens.shape, self.embedding_dim)


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a linear map or an embedding stays in blocks."""
    return isinstance(module, PackedLinear | PackedEmbedding)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does what ``nn.Linear`` does, in blocks or not, and nothing else."""
    if isinstance(module, PackedLinear):
        return type(module).__bases__ == (PackedLinear,) and module.order is None
    return type(module) is nn.Linear


def held_by(module: Any) -> object:
    """What a linear map or an embedding has as its weight: the same object where two share it. Nothing is unpacked."""
    return module.packed["weight"] if is_packed(module) else module.weight


def shape_of(module: Any) -> tuple[int, int]:
    """Rows and columns of the weight of a module. Nothing is unpacked."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape
    return rows, columns


def rows_of(embedding: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The rows of an embedding's weight for tokens [tokens], in float32, without what its class does with them."""
    rows: torch.Tensor = (
        embedding.table.rows(tokens).float() if is_packed(embedding) else embedding.weight[tokens].float()
    )
    return rows


def num_parameters(model: nn.Module) -> int:
    """How many numbers the weights of a model are, those in blocks included. What is tied counts once."""
    in_blocks = {stored for module in model.modules() for stored in getattr(module, "packed", {}).values()}
    sizes: list[int] = [weight.numel() for weight in model.parameters()]
    return sum([*sizes, *(one.shape().numel() for one in in_blocks)])


def pack(module: Any, name: str, stored: Stored, dtype: torch.dtype, make: MakeProduct, full_name: str = "") -> bool:
    """Let a module compute with blocks in the place of its parameter ``name``, which is gone then.

    False, and nothing is changed, where it cannot: a class that is neither a linear map nor an embedding, or blocks
    that ``make`` does not know.
    """
    if name != "weight" or not isinstance(module, nn.Linear | nn.Embedding):
        return False
    if isinstance(make, OnDevice):
        matrix = make.matrix_of(stored)
        if matrix is None:
            return False
        base = PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear
        _put(module, base, stored, dtype, product=matrix, table=matrix, on_device=matrix, order=None)
        return True
    blocks = stored.blocks()
    if blocks is None:
        return False
    if isinstance(module, nn.Embedding):
        _put(module, PackedEmbedding, stored, dtype, table=blocks, as_product=partial(make, blocks, full_name))
        return True
    product = make(blocks, full_name)
    if product is None:
        return False
    _put(module, PackedLinear, stored, dtype, product=product, order=blocks.order)
    return True


def _put(module: Any, base: type[nn.Module], stored: Stored, dtype: torch.dtype, **more: Any) -> None:
    own = type(module)
    del module.weight
    bases = (base,) if own in base.__mro__ else (own, base)
    module.__class__ = type(f"Packed{own.__name__}", bases, {})
    for key, value in {"packed": {"weight": stored}, "is_loading": True, "kept_dtype": dtype, **more}.items():
        setattr(module, key, value)
