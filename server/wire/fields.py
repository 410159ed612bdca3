"""The scalar types of proto3 JSON as pydantic types: what each accepts, and its name in Google's error messages.

Source: the proto3 JSON mapping, and what clients send (wire reference, section 6).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError, PydanticOmit

from server.wire.support import MAX_NAMED

SHOWN_CHARACTERS = 64
_BASE64_OF_URLS = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\v\f"


class Tally:
    """How many problems of a request were found so far."""

    found = 0


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Within the block the first ``MAX_NAMED`` problems become pydantic errors, which cost a kilobyte each; the others
    are counted and left out of what is checked."""
    tally = Tally()
    token = _TALLY.set(tally)
    try:
        yield tally
    finally:
        _TALLY.reset(token)


def is_named() -> bool:
    """Count one problem; returns whether it is among those that are named."""
    tally = _TALLY.get()
    if tally is None:
        return True
    tally.found += 1
    return tally.found <= MAX_NAMED


def must_be_named() -> None:
    """Count one problem. Raises ``PydanticOmit`` where enough are named."""
    if not is_named():
        raise PydanticOmit


def invalid(label: str, value: Any) -> PydanticCustomError:
    """The error of a value that is not of the type; ``label`` is the type's name on the wire.

    Raises ``PydanticOmit`` instead where enough problems are named.
    """
    must_be_named()
    return PydanticCustomError("invalid_value", "{label}, {shown}", {"label": f"({label})", "shown": shown(value)})


def shown(value: Any) -> str:
    """A value as short ASCII JSON."""
    if isinstance(value, (dict, list)):
        return "{…}" if isinstance(value, dict) else "[…]"
    text = json.dumps(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _float(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise invalid("TYPE_FLOAT", value)
    return number


def _int32(value: Any) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or not -(2**31) <= number < 2**31:
        raise invalid("TYPE_INT32", value)
    return int(number)


def _int64(value: Any) -> int:
    """Clients send them as strings, as proto3 JSON has it, or as numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) <= 20:
        number = int(value)
    else:
        raise invalid("TYPE_INT64", value)
    if not -(2**63) <= number < 2**63:
        raise invalid("TYPE_INT64", value)
    return number


def _number(value: Any) -> float | None:
    """A finite number, also one in a string, as proto3 JSON has it; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    plain = not isinstance(value, str) or (value.isascii() and "_" not in value and value == value.strip())
    return number if plain and math.isfinite(number) else None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid("TYPE_BOOL", value)
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise invalid("TYPE_STRING", value)
    return value


def _bytes(value: Any) -> bytes:
    """base64 or base64url, padded or not, in one line or several: clients send them all (Android breaks lines after 76
    characters, Ruby after 60)."""
    if not isinstance(value, str):
        raise invalid("TYPE_BYTES", value)
    try:
        digits = value.encode("ascii").translate(_BASE64_OF_URLS, _WHITE_SPACE).rstrip(b"=")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        must_be_named()
        raise PydanticCustomError(
            "invalid_value", "{label}, {shown}", {"label": "(TYPE_BYTES)", "shown": "Base64 decoding failed"}
        ) from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid("type.googleapis.com/google.protobuf.Struct", value)
    return value


def _listed(value: Any) -> Any:
    """A single value where a list is expected is a list of one; the real parser takes it too."""
    return value if isinstance(value, list) else [value]


class Names:
    """An enum: its names in the order of their numbers, the first meaning "unspecified", which is None here.

    Accepts names in any case and numbers.
    """

    def __init__(self, label: str, *names: str) -> None:
        self._label = f"type.googleapis.com/google.ai.generativelanguage.v1beta.{label}"
        self._names = names
        self._known = {name.upper(): name for name in names}

    def __call__(self, value: Any) -> str | None:
        if isinstance(value, str) and value.upper() in self._known:
            name = self._known[value.upper()]
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and self._numbers(value):
            name = self._names[int(value)]
        else:
            raise invalid(self._label, value)
        return None if name == self._names[0] else name

    def _numbers(self, value: float) -> bool:
        return 0 <= value < len(self._names) and value == int(value)


Element = TypeVar("Element")
Float = Annotated[float, BeforeValidator(_float)]
Int32 = Annotated[int, BeforeValidator(_int32)]
Int64 = Annotated[int, BeforeValidator(_int64)]
Bool = Annotated[bool, BeforeValidator(_bool)]
String = Annotated[str, BeforeValidator(_string)]
Bytes = Annotated[bytes, BeforeValidator(_bytes)]
Object = Annotated[dict[str, Any], BeforeValidator(_object)]
"""Data of the user (arguments, JSON schemas, settings of tools): never renamed, never checked here."""
Repeated = Annotated[tuple[Element, ...], BeforeValidator(_listed)]
