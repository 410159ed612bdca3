"""What the metadata of a GGUF file say of a model, by the keys of its architecture, each checked as it is read."""

from __future__ import annotations

import math
from typing import Any, overload

from engine.gguf.header import Header, Unreadable

LARGEST = 1 << 31
MOST_LAYERS = 1000


class Fields:
    """The keys below ``ARCHITECTURE.`` of a header; what is missing, or of a wrong kind, is refused."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._prefix = header.architecture

    def __contains__(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self.header.metadata

    @overload
    def count(self, key: str) -> int: ...
    @overload
    def count(self, key: str, default: int) -> int: ...
    @overload
    def count(self, key: str, default: int | None) -> int | None: ...
    def count(self, key: str, default: Any = ...) -> Any:
        """A whole number; where each layer has one, and all have the same, that one."""
        value = self._value(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST):
            raise Unreadable(f"its {self._prefix}.{key} is {value!r}, not a whole number below {LARGEST}")
        return value

    def counts(self, key: str, layers: int) -> list[int]:
        """A whole number for each layer; the same for all where the file has one."""
        value = self._value(key, ...)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or not all(isinstance(number, int) and 0 <= number < LARGEST for number in values):
            raise Unreadable(f"its {self._prefix}.{key} is {value!r}, not a whole number for each of {layers} layers")
        return [int(number) for number in values]

    def flags(self, key: str, layers: int) -> list[bool]:
        """A truth value for each layer."""
        value = self._value(key, ...)
        if not isinstance(value, list) or len(value) != layers:
            raise Unreadable(f"its {self._prefix}.{key} is {value!r}, not a truth value for each of {layers} layers")
        return [bool(flag) for flag in value]

    def real(self, key: str, default: Any = ...) -> Any:
        """A number. Written as a float32, it is taken as the shortest decimal that means the same: 1e-05."""
        value = self._value(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Unreadable(f"its {self._prefix}.{key} is {value!r}, not a number")
        return shortest(float(value))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(key, default))

    def text(self, key: str, default: str) -> str:
        return str(self._value(key, default))

    def layers(self) -> int:
        found = self.count("block_count")
        if not 1 <= found <= MOST_LAYERS:
            raise Unreadable(f"its {self._prefix}.block_count is {found}; 1 to {MOST_LAYERS} are read")
        return found

    def token_id(self, kind: str) -> int | None:
        """The id of a special token, ``eos`` for example."""
        value = self.header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return value if isinstance(value, int) else None

    def _value(self, key: str, default: Any) -> Any:
        value = self.header.metadata.get(f"{self._prefix}.{key}", default)
        if value is ...:
            raise Unreadable(f"its header has no {self._prefix}.{key}, which a model of this architecture needs")
        return value


def shortest(value: float) -> float:
    """The decimal with the fewest digits that is the same float32: 1e-06 for 9.999999974752427e-07."""
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if float(single) == value else value
