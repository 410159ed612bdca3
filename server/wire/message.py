"""The base of all wire messages: field names in both spellings, and pydantic's errors in Google's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from server.errors import FieldViolation
from server.wire.fields import invalid, is_named, must_be_named, shown, tallied
from server.wire.paths import camel
from server.wire.support import MAX_NAMED, joined

M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """A proto3 message. Fields are named in snake_case; null is absence; unknown names are errors.

    ``text_field`` names the field that a bare string sets, in messages that may be sent as a string.
    ``other_names`` are old JSON names of fields. ``oneof`` are fields of which only one may be set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    text_field: ClassVar[str] = ""
    other_names: ClassVar[dict[str, str]] = {}
    oneof: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _with_our_names(cls, value: Any) -> Any:
        """Rename camelCase fields, and drop nulls and unknown names that are only counted. Nested user data stays as it
        is."""
        if isinstance(value, str) and cls.text_field:
            value = {cls.text_field: value}
        if not isinstance(value, dict):
            raise invalid(f"type.googleapis.com/google.ai.generativelanguage.v1beta.{cls.__name__}", value)
        names = cls._names()
        renamed: dict[str, Any] = {}
        given: dict[str, Any] = value
        unknown: list[str] = []
        for key, content in given.items():
            name = names.get(key)
            if name in renamed:
                raise _already_set(f"_{name}", key)
            if content is not None and name is not None:
                renamed[name] = content
            elif content is not None:
                unknown.append(key)
        kinds = [name for name in cls.oneof if name in renamed]
        if len(kinds) > 1:
            raise _already_set("data", camel(kinds[1]))
        # Counted last: a message that is left out must not drop problems that should be named.
        return renamed | {key: given[key] for key in unknown if is_named()}

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Each accepted spelling of each field; made once per class."""
        if "_spellings" not in cls.__dict__:
            spellings = {camel(name): name for name in cls.model_fields} | {name: name for name in cls.model_fields}
            cls._spellings = spellings | cls.other_names
        return cls._spellings

    _spellings: ClassVar[dict[str, str]] = {}


def parse(kind: type[M], payload: Any) -> M:
    """``payload`` as a message. Raises ``InvalidArgument`` with one violation per problem, at most ``MAX_NAMED``."""
    with tallied() as tally:
        try:
            return kind.model_validate(payload)
        except ValidationError as failure:
            problems = failure.errors(include_url=False, include_context=True)
    more = max(tally.found - MAX_NAMED, 0)
    raise joined([_violation(kind, found) for found in problems], more)


def _already_set(field: str, key: str) -> PydanticCustomError:
    must_be_named()
    return PydanticCustomError(
        "already_set", "oneof field '{field}' is already set. Cannot set '{key}'", {"field": field, "key": key}
    )


def _violation(kind: type[Message], found: ErrorDetails) -> FieldViolation:
    """One of pydantic's errors in the real service's words."""
    loc = found["loc"]
    path = _path(loc)
    match found["type"]:
        case "extra_forbidden":
            where = _path(loc[:-1])
            at = f" at '{where}'" if where else ""
            name = shown(loc[-1])
            text = f"Invalid JSON payload received. Unknown name {name}{at}: Cannot find field."
            return FieldViolation(where, text)
        case "already_set":
            return FieldViolation(path, f"Invalid value at '{path or 'request'}' (oneof), {found['msg']}")
        case "invalid_value":
            return FieldViolation(path, f"Invalid value at '{path or 'request'}' {found['msg']}")
        case _:
            field = f"{kind.__name__}.{path}" if path else kind.__name__
    limits = found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            limit = f"must be at least {limits['ge']}"
        case "less_than_equal":
            limit = f"must be at most {limits['le']}"
        case "too_short":
            limit = "must not be empty"
        case "too_long":
            limit = f"must have a length of at most {limits['max_length']}, not {limits['actual_length']}"
        case _:
            limit = found["msg"]
    return FieldViolation(path, f"* {field}: {shown(found['input'])} {limit}")


def _path(loc: Sequence[str | int]) -> str:
    """A location as a snake_case path with indices."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text
