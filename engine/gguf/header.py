"""The header of a GGUF file, of one part or of several: metadata, and where each tensor lies.

The format is ggml's (docs/gguf.md of its repository, versions 2 and 3). Nothing that a file says is believed before it
is compared with the file: lengths, offsets and counts beyond its end are refused, so that a header of a few bytes
cannot ask for gigabytes. Only the header is read; the data of tensors is mapped by those who want it.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from engine.api.errors import ModelRefused
from engine.packed.schemes import SCHEMES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
"""ggml has no tensors of more (ggml.h, GGML_MAX_DIMS)."""
MOST_PARTS = 1000
MOST_ELEMENTS = 1 << 24
"""Of an array: more than any vocabulary or its merges have. An element takes up to 60 bytes once it is read."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class Unreadable(ModelRefused):
    """The file is no GGUF file, or is not whole; the message says why."""


class Tensor(NamedTuple):
    """A tensor of a file: ``shape`` as torch has it, ``kind`` ggml's number of its type, ``start`` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    start: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata of a model by key, arrays as lists, and its tensors by name, of all parts."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    parts: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> Header:
    """The header of the model in ``path`` and, where that is the first of several parts, of those beside it.

    Raises ``Unreadable``.
    """
    metadata, tensors = _read_part(path)
    count = metadata.get("split.count", 1)
    parts: tuple[Path, ...] = (path,)
    if count != 1:
        parts = _parts(path, count, metadata.get("split.no"))
        for part in parts[1:]:
            _, more = _read_part(part)
            if twice := tensors.keys() & more.keys():
                raise Unreadable(f"{part.name} has the tensor {min(twice)!r} once more; its parts belong to two models")
            tensors |= more
        told = metadata.get("split.tensors.count", len(tensors))
        if told != len(tensors):
            raise Unreadable(f"its {count} parts have {len(tensors)} tensors, and the first one speaks of {told}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise Unreadable("its header names no general.architecture")
    return Header(metadata, tensors, parts)


def _parts(path: Path, count: object, number: object) -> tuple[Path, ...]:
    """All parts of a model, in order, of which ``path`` must be the first."""
    named = _PART.fullmatch(path.name)
    if not isinstance(count, int) or not 1 < count <= MOST_PARTS or not named or int(named["count"]) != count:
        raise Unreadable(
            f"its header speaks of {count} parts, which must be called NAME-00001-of-{count:05} and so on, side by side"
        )
    if number != 0:
        raise Unreadable(f"it is part {named['number']} of {count}; name the first one, {_part_name(named, 1)}")
    parts = tuple(path.with_name(_part_name(named, place + 1)) for place in range(count))
    for part in parts:
        if not part.is_file():
            raise Unreadable(f"its part {part.name} is missing; all {count} must lie side by side")
    return parts


def _part_name(named: re.Match[str], number: int) -> str:
    return f"{named['stem']}-{number:05}-of-{named['count']}.gguf"


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise Unreadable("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content, path.name)
            num_tensors, num_keys = reader.begin()
            metadata: dict[str, Any] = {}
            for _ in range(num_keys):
                key = reader.text()
                metadata[key] = reader.value(reader.number("I"))
            announced = [reader.tensor() for _ in range(num_tensors)]
            alignment = metadata.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
                raise Unreadable(f"general.alignment of {path.name} is {alignment!r}, not a power of two")
            data = (reader.at + alignment - 1) // alignment * alignment
            tensors: dict[str, Tensor] = {}
            for name, shape, kind, offset in announced:
                size = _bytes_of(name, shape, kind)
                if offset % alignment or data + offset + size > len(content):
                    raise Unreadable(
                        f"the file is cut off or damaged: {path.name} should have the tensor {name!r} up to byte "
                        f"{data + offset + size} and has {len(content)}; copy or download it again"
                    )
                if name in tensors:
                    raise Unreadable(f"{path.name} has the tensor {name!r} twice")
                tensors[name] = Tensor(name, shape, kind, path, data + offset)
            return metadata, tensors


FLOATS = {0: 4, 1: 2, 30: 2, 28: 8}
"""The size of a number in bytes, of ggml's types F32, F16, BF16 and F64."""

_OTHERS = {24: "I8", 25: "I16", 26: "I32", 27: "I64", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 9: "Q8_1", 15: "Q8_K"}


def _bytes_of(name: str, shape: tuple[int, ...], kind: int) -> int:
    """The size of a tensor's data. Raises ``Unreadable`` for a type that is not read."""
    if kind in FLOATS:
        return prod(shape) * FLOATS[kind]
    if kind not in SCHEMES:
        known = ", ".join(sorted(scheme.name for scheme in SCHEMES.values()))
        raise Unreadable(
            f"its tensor {name} is in {_OTHERS.get(kind, f'the type {kind}')}, which cannot be unpacked; known are "
            f"F32, F16, BF16, {known}"
        )
    scheme = SCHEMES[kind]
    if not shape or shape[-1] % scheme.columns:
        raise Unreadable(f"its tensor {name} of shape {shape} does not divide into blocks of {scheme.name}")
    return prod(shape[:-1]) * scheme.row_bytes(shape[-1])


class _Reader:
    """Reads numbers and texts one after the other, none of them beyond the end of the file."""

    def __init__(self, content: mmap.mmap, name: str) -> None:
        self.at = 0
        self._content = content
        self._name = name

    def begin(self) -> tuple[int, int]:
        """The number of tensors and the number of keys."""
        if self._content[:4] != MAGIC:
            raise Unreadable(f"{self._name} does not begin with GGUF; it is no GGUF file")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            hint = "; big-endian files are not read" if version >> 16 else ""
            raise Unreadable(f"{self._name} has version {version} of GGUF; 2 and 3 are read{hint}")
        tensors, keys = self.number("Q"), self.number("Q")
        self._require(24 * tensors + 13 * keys)  # the least that each of them takes
        return tensors, keys

    def number(self, format: str) -> Any:
        (value,) = self._numbers(format, 1)
        return value

    def _numbers(self, format: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{format}") * count
        self._require(size)
        values = struct.unpack_from(f"<{count}{format}", self._content, self.at)
        self.at += size
        return values

    def text(self) -> str:
        length = self.number("Q")
        self._require(length)
        self.at += length
        try:
            return self._content[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise Unreadable(f"{self._name} has a text at byte {self.at - length} that is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise Unreadable(f"{self._name} has metadata of the type {kind} before byte {self.at}, which is not known")
        of, count = self.number("I"), self.number("Q")
        size = 8 if of == _STRING else struct.calcsize(f"<{_NUMBERS.get(of, 'B')}")
        self._require(size * count)
        if count > MOST_ELEMENTS:
            raise Unreadable(f"{self._name} has an array of {count} elements; at most {MOST_ELEMENTS} are read")
        if of in _NUMBERS:
            return list(self._numbers(_NUMBERS[of], count))
        if of != _STRING:
            raise Unreadable(f"{self._name} has an array of the type {of} before byte {self.at}, which is not known")
        return [self.text() for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as torch has it, type and offset."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise Unreadable(f"its tensor {name!r} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} are known")
        shape = tuple(reversed(self._numbers("Q", dimensions)))
        return name, shape, self.number("I"), self.number("Q")

    def _require(self, size: int) -> None:
        if self.at + size > len(self._content):
            raise Unreadable(
                f"the file is cut off or damaged: {self._name} should have at least {self.at + size} bytes and has "
                f"{len(self._content)}; copy or download it again"
            )
