"""What happens to each field of a request, as data beside the field, and the one walker that acts on it.

Every wire field carries one of three annotations: ``Honoured`` (it has its full effect), ``Refused`` (a value is an
error that names the field) or ``Ignored`` (checked, without effect, and named in the header ``x-castor-ignored``).
An operator may list fields that a model accepts without effect although they would be honoured or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel

from server.config.field_paths import field_path
from server.errors import FieldViolation, InvalidArgument, Unimplemented
from server.wire.paths import ROOT, Path, camel

B = TypeVar("B", bound=BaseModel)

MAX_NAMED = 20
"""Problems of one request that its answer names; a body may contain a million of one kind."""
MAX_IGNORED = 100
"""Places of one request without effect that are named in its answer and in the log."""

THINKING = "thinking"
"""The ability of models that think before they answer."""


@dataclass(frozen=True, slots=True)
class Support:
    """How a field is treated; ``why`` is one line for the caller."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Honoured(Support):
    """The field has its full effect. Where only some values have it, ``only`` says which; others are refused.

    Where the model has the ability that ``requires`` names, all values have it.
    """

    only: Callable[[Any], bool] | None = None
    code: int = 501
    requires: str = ""


@dataclass(frozen=True, slots=True)
class Refused(Support):
    """A value of this field is an error: 501 where the server lacks the feature, 400 where the request is wrong.

    ``presence`` says that an empty message means something too (``{"googleSearch": {}}`` switches a tool on).
    """

    code: int = 501
    presence: bool = False


@dataclass(frozen=True, slots=True)
class Ignored(Support):
    """The field is checked and has no effect."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do, and the fields that its operator accepts without effect (see ``field_path``)."""

    abilities: frozenset[str] = frozenset()
    lenient: frozenset[str] = frozenset()


STRICT = Capabilities()
WAIVED = Ignored("the operator waives it")


class FieldFinding(NamedTuple):
    """A field that is set and not fully honoured. ``path`` is its JSON path, ``field`` the snake_case one."""

    path: str
    field: str
    value: Any
    support: Support


@lru_cache(maxsize=256)
def supports(kind: type[BaseModel]) -> dict[str, Support]:
    """The annotation of each field of a message. A field without one is a bug."""
    found = {}
    for name, field in kind.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Support)]
        assert len(marks) == 1, f"{kind.__name__}.{name} needs exactly one support annotation"
        found[name] = marks[0]
    return found


@lru_cache(maxsize=8)
def fields_of(kind: type[BaseModel]) -> dict[str, Support]:
    """Every field of a message and of the messages in it, by JSON path without indices; what is in a field that is
    refused or has no effect shares its fate. No message holds itself."""
    found: dict[str, Support] = {}
    for name, support in supports(kind).items():
        found[camel(name)] = support
        for inner in messages_in(kind, name):
            for path, below in fields_of(inner).items():
                found[f"{camel(name)}.{path}"] = below if isinstance(support, Honoured) else support
    return found


def messages_in(kind: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The messages that a field holds, alone or in a list; none where it holds a scalar or data of the user."""
    found, left = [], [kind.model_fields[name].annotation]
    while left:
        annotation = left.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        left = [*get_args(annotation), *left]
    return found


def findings(message: BaseModel, capabilities: Capabilities = STRICT, path: Path = ROOT) -> Iterator[FieldFinding]:
    """Walk a message: every field that is set and refused or ignored, in order."""
    for name, support in _given(message):
        value, place = getattr(message, name), path.to(name)
        if _is_waived(value, place, support, capabilities):
            yield FieldFinding(*place, value, WAIVED)
            continue
        match support:
            case Honoured():
                if _is_set(value) and not _has_effect(value, support, capabilities):
                    yield FieldFinding(*place, value, support)
                yield from _inside(value, capabilities, place)
            case Refused(presence=presence):
                if (value is not None) if presence else _is_set(value):
                    yield FieldFinding(*place, value, support)
            case _:
                if _is_set(value):
                    yield FieldFinding(*place, value, support)


def review(message: B, capabilities: Capabilities = STRICT) -> tuple[B, list[str]]:
    """The message without fields that have no effect, and the first JSON paths of these.

    Raises ``InvalidArgument`` or ``Unimplemented`` naming every field that is not served; a 400 wins, because such a
    request fails anywhere.
    """
    ignored: dict[str, None] = {}
    waived: set[str] = set()
    named: dict[int, list[FieldViolation]] = {400: [], 501: []}
    counts = {400: 0, 501: 0}
    for found in findings(message, capabilities):
        if isinstance(found.support, (Honoured, Refused)):
            code = found.support.code
            counts[code] += 1
            if counts[code] <= MAX_NAMED:
                value = f" {found.value}" if isinstance(found.value, (int, float)) else ""
                named[code].append(FieldViolation(found.field, f"{found.path}{value}: {found.support.why}"))
            continue
        if found.support is WAIVED:
            waived.add(found.path)
        if len(ignored) < MAX_IGNORED:
            ignored[found.path] = None
    if counts[400]:
        raise joined(named[400], counts[400] - len(named[400]))
    if counts[501]:
        violations = _limited(named[501], counts[501] - len(named[501]))
        raise Unimplemented("\n".join(violation.description for violation in violations), violations)
    return _without(message, frozenset(waived)) if waived else message, list(ignored)


def _is_waived(value: Any, place: Path, support: Support, capabilities: Capabilities) -> bool:
    """Whether a field is on the operator's list; a value that is served stays in effect, even if others of the field
    are not."""
    if not capabilities.lenient or field_path(place.json) not in capabilities.lenient:
        return False
    if isinstance(support, Honoured) and support.only is not None and _has_effect(value, support, capabilities):
        return False
    return _is_set(value) or (isinstance(support, Refused) and support.presence)


def _has_effect(value: Any, support: Honoured, capabilities: Capabilities) -> bool:
    return support.only is None or support.requires in capabilities.abilities or support.only(value)


def _without(message: B, dropped: frozenset[str], path: Path = ROOT) -> B:
    """A copy that lacks the fields at these JSON paths."""
    kept = {name: getattr(message, name) for name, _ in _given(message) if path.to(name).json not in dropped}
    return type(message).model_construct(**{name: _pruned(kept[name], dropped, path.to(name)) for name in kept})


def _pruned(value: Any, dropped: frozenset[str], path: Path) -> Any:
    if isinstance(value, BaseModel):
        return _without(value, dropped, path)
    if isinstance(value, tuple):
        return tuple(_pruned(element, dropped, path.at(index)) for index, element in enumerate(value))
    return value


def _limited(violations: list[FieldViolation], more: int) -> list[FieldViolation]:
    """The first problems, then the number of the others, with the ``more`` that were only counted."""
    left = len(violations[MAX_NAMED:]) + more
    return [*violations[:MAX_NAMED], *([FieldViolation("", f"… and {left} more problems")] if left else [])]


def _given(message: BaseModel) -> list[tuple[str, Support]]:
    given = message.model_fields_set
    return [(name, support) for name, support in supports(type(message)).items() if name in given]


def _inside(value: Any, capabilities: Capabilities, path: Path) -> Iterator[FieldFinding]:
    if isinstance(value, BaseModel):
        yield from findings(value, capabilities, path)
    elif isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _inside(element, capabilities, path.at(index))


def _is_set(value: Any) -> bool:
    """Whether a value says more than proto3's default, which is the same as absence."""
    if isinstance(value, BaseModel):
        return any(_is_set(getattr(value, name)) for name, _ in _given(value))
    if isinstance(value, tuple):
        return any(map(_is_set, value))
    return bool(value)


def joined(violations: list[FieldViolation], more: int = 0) -> InvalidArgument:
    """Several problems as one 400, bounded in length; ``more`` is how many others were only counted."""
    return InvalidArgument.of(_limited(violations, more))
