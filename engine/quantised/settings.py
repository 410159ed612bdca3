"""What a ``quantization_config`` says, and the words in which one that cannot be served is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from engine.api.errors import ModelRefused

_INSTEAD = "take the repository of the same model in bfloat16, or a GGUF file of it"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one method, or a part of them; ``method`` is what refusals call it."""

    method: str
    found: Mapping[str, Any]

    def refusal(self, setting: str, why: str = "which is not known") -> ModelRefused:
        """Of a setting, with its value."""
        shown = f"{self.method}, {setting} {self.found.get(setting)!r}"
        return ModelRefused(f"quantised weights ({shown}) are not loaded: {why}; {_INSTEAD}")

    def one_of(self, setting: str, known: Collection[Any], default: Any) -> Any:
        """A setting in small letters, if it is a text; the default where it is not set. Refuses what is not known."""
        value = self.found.get(setting)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        if value not in tuple(known):
            raise self.refusal(setting, "known are " + ", ".join(str(one) for one in known))
        return value

    def numbers(self, setting: str, count: int) -> tuple[int, ...] | None:
        """Some positive integers, or None where they are not set."""
        value = self.found.get(setting)
        if value is None:
            return None
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(type(one) is int and one > 0 for one in value)
        ):
            raise self.refusal(setting, f"it must be {count} positive integers")
        return tuple(value)

    def part(self, setting: str) -> Settings:
        """Settings below one, empty where it is not set."""
        value = self.found.get(setting)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.refusal(setting, "it must be an object")
        return Settings(self.method, value)


def unknown(method: str) -> ModelRefused:
    """The refusal of a method as a whole."""
    return ModelRefused(f"quantised weights (quantization_config: {method}) are not loaded; {_INSTEAD}")


def damaged(method: str, what: str) -> ModelRefused:
    """The refusal of stored tensors that are not what the method says."""
    return ModelRefused(
        f"quantised weights ({method}) are damaged or of another layout: {what}; fetch the files again, or {_INSTEAD}"
    )
