"""The structures of a model as bytes that can be mapped at any address: where their pointers are, and to what."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_ALIGNED = 64
_CHUNK = 1 << 20
_POINTER = ctypes.sizeof(ctypes.c_void_p)


class Region(NamedTuple):
    """Bytes that a model points to and that are not its own: a part of a ``segment``, from ``offset`` on."""

    address: int
    num_bytes: int
    segment: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Linked:
    """``parts`` are addresses and lengths of the bytes, one after another, each padded to a multiple of 64.

    ``pointers`` (int64 [count, 3]) are places in these bytes, the segment that is pointed to and the offset in it.
    Segment 0 are the bytes themselves.
    """

    parts: list[tuple[int, int]]
    pointers: np.ndarray

    def chunks(self) -> Iterable[bytes]:
        """The bytes, few enough at a time that they take no memory to speak of."""
        for address, length in self.parts:
            for start in range(0, length, _CHUNK):
                yield ctypes.string_at(address + start, min(_CHUNK, length - start))
            yield bytes(-length % _ALIGNED)


def link(root: ctypes.Structure, kept: Iterable[object], others: Sequence[Region]) -> Linked:
    """``root`` and the ``kept`` arrays of ctypes and tensors that it leads to: ``root`` first, the largest last.

    Raises ``ValueError`` for a pointer that leads to none of these and to no region of ``others``.
    """
    starts = sorted(others)
    found: dict[int, Any] = {ctypes.addressof(root): root}
    for item in kept:
        if isinstance(item, (ctypes.Array, ctypes.Structure)):
            found.setdefault(ctypes.addressof(item), item)
        elif hasattr(item, "data_ptr") and not _is_within(item.data_ptr(), starts):
            found.setdefault(item.data_ptr(), item)
    parts, regions, offset = [], list(others), 0
    structures = []
    sizes = {
        address: item.nbytes if hasattr(item, "data_ptr") else ctypes.sizeof(item) for address, item in found.items()
    }
    first, *rest = found.items()
    for address, item in [first, *sorted(rest, key=lambda pair: sizes[pair[0]])]:
        length = sizes[address]
        parts.append((address, length))
        regions.append(Region(address, length, 0, offset))
        if isinstance(item, (ctypes.Array, ctypes.Structure)):
            structures.append((address, offset, _pointers_in(type(item))))
        offset += -(-length // _ALIGNED) * _ALIGNED
    return Linked(parts, _resolved(structures, sorted(regions)))


def relink(data: np.ndarray, pointers: np.ndarray, segments: Sequence[int]) -> None:
    """Have the pointers in ``data``, bytes that ``link`` described, lead to ``segments`` at these addresses.

    Segment 0 is where ``data`` lies, whatever is given for it. Raises ``IndexError`` for what is not in its bounds.
    """
    bases = np.array([data.ctypes.data, *segments[1:]], np.int64)
    places, segment, offset = pointers.T
    if (places % _POINTER).any():
        raise IndexError("a pointer is not at the place of one")
    data.view(np.int64)[places // _POINTER] = bases[segment] + offset


def _is_within(address: int, regions: Sequence[Region]) -> bool:
    return any(region.address <= address < region.address + region.num_bytes for region in regions)


def _pointers_in(kind: Any) -> np.ndarray:
    """The offsets of all pointers in a type of ctypes."""
    if issubclass(kind, (ctypes.c_void_p, ctypes._Pointer)):
        return np.zeros(1, np.int64)
    if issubclass(kind, ctypes.Array):
        each = np.arange(kind._length_, dtype=np.int64) * ctypes.sizeof(kind._type_)
        inside = _pointers_in(kind._type_)
        return np.asarray(each[:, None] + inside).ravel()
    if issubclass(kind, ctypes.Structure):
        fields = [(getattr(kind, field[0]).offset, field[1]) for field in kind._fields_]
        return np.concatenate([np.empty(0, np.int64), *(offset + _pointers_in(of) for offset, of in fields)])
    return np.empty(0, np.int64)


def _resolved(structures: list[tuple[int, int, np.ndarray]], regions: list[Region]) -> np.ndarray:
    addresses, lengths, segments, offsets = np.array(regions, np.int64).T
    found = []
    for address, offset, places in structures:
        size = int(places.max(initial=-_POINTER)) + _POINTER
        words = np.frombuffer(ctypes.string_at(address, size), np.int64)
        values = words[places // _POINTER]
        places, values = places[values != 0], values[values != 0]
        region = addresses.searchsorted(values, side="right") - 1
        inside = values - addresses[region]
        if (region < 0).any() or (inside >= lengths[region]).any():
            raise ValueError("a pointer leads to nothing that is kept")
        found.append(np.stack([offset + places, segments[region], offsets[region] + inside], axis=1))
    return np.concatenate(found)
