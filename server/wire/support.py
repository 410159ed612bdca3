"""What happens to each field of a request, as data beside the field, and the one walker that acts on it.

Every wire field carries one of three annotations: ``Honoured`` (it has its full effect), ``Refused`` (a value is an
error that names the field) or ``Ignored`` (checked, without effect, and named in the header ``x-castor-ignored``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from server.errors import ApiError, FieldViolation, InvalidArgument, Unimplemented


@dataclass(frozen=True, slots=True)
class Support:
    """How a field is treated; ``why`` is one line for the caller."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Honoured(Support):
    """The field has its full effect. Where only some values have, ``only`` tells which; others are refused."""

    only: Callable[[Any], bool] | None = None
    code: int = 501


@dataclass(frozen=True, slots=True)
class Refused(Support):
    """A value of this field is an error: 501 where the server lacks the feature, 400 where the request is wrong.

    ``presence`` tells that an empty message means something too (``{"googleSearch": {}}`` switches a tool on).
    """

    code: int = 501
    presence: bool = False


@dataclass(frozen=True, slots=True)
class Ignored(Support):
    """The field is checked and has no effect."""


class Finding(NamedTuple):
    """A field that is set and not fully honoured. ``path`` is its JSON path, ``field`` the snake_case one."""

    path: str
    field: str
    value: Any
    support: Support


class Path(NamedTuple):
    """A place in a message, in both spellings of its fields."""

    json: str = ""
    snake: str = ""

    def to(self, name: str) -> Path:
        """The field ``name`` (snake_case) of the message at this path."""
        json, snake = camel(name), name
        return Path(f"{self.json}.{json}", f"{self.snake}.{snake}") if self.json else Path(json, snake)

    def at(self, index: int) -> Path:
        """The element of the list at this path."""
        return Path(f"{self.json}[{index}]", f"{self.snake}[{index}]")


ROOT = Path()


def camel(name: str) -> str:
    """proto3's JSON name of a field."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


@lru_cache(maxsize=256)
def supports(kind: type[BaseModel]) -> dict[str, Support]:
    """The annotation of each field of a message. A field without one is a mistake of ours."""
    found = {}
    for name, field in kind.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Support)]
        assert len(marks) == 1, f"{kind.__name__}.{name} needs exactly one support annotation"
        found[name] = marks[0]
    return found


def findings(message: BaseModel, path: Path = ROOT) -> Iterator[Finding]:
    """Walk a message: every field that is set and refused or ignored, in order."""
    for name, support in _given(message):
        value, place = getattr(message, name), path.to(name)
        match support:
            case Honoured(only=only):
                if only is not None and _is_set(value) and not only(value):
                    yield Finding(*place, value, support)
                yield from _inside(value, place)
            case Refused(presence=presence):
                if (value is not None) if presence else _is_set(value):
                    yield Finding(*place, value, support)
            case _:
                if _is_set(value):
                    yield Finding(*place, value, support)


def review(message: BaseModel) -> list[str]:
    """The JSON paths of what is accepted without effect. Raises ``InvalidArgument`` or ``Unimplemented`` naming every
    field that is not served; a 400 wins, because repeating such a request is no use anywhere."""
    found = list(findings(message))
    refused = [finding for finding in found if not isinstance(finding.support, Ignored)]
    if refused:
        raise _refusal(refused)
    return list(dict.fromkeys(finding.path for finding in found))


def _refusal(refused: list[Finding]) -> ApiError:
    wrong = [finding for finding in refused if getattr(finding.support, "code", 501) == 400]
    violations = _limited([FieldViolation(f.field, _sentence(f)) for f in (wrong or refused)])
    if wrong:
        return InvalidArgument.of(violations)
    return Unimplemented("\n".join(violation.description for violation in violations), violations)


def _sentence(finding: Finding) -> str:
    value = f" {finding.value}" if isinstance(finding.value, (int, float)) else ""
    return f"{finding.path}{value}: {finding.support.why}"


def _limited(violations: list[FieldViolation], limit: int = 20) -> list[FieldViolation]:
    """The first problems; a body may hold a million of one kind."""
    if len(violations) <= limit:
        return violations
    return [*violations[:limit], FieldViolation("", f"… and {len(violations) - limit} more problems")]


def _given(message: BaseModel) -> list[tuple[str, Support]]:
    given = message.model_fields_set
    return [(name, support) for name, support in supports(type(message)).items() if name in given]


def _inside(value: Any, path: Path) -> Iterator[Finding]:
    if isinstance(value, BaseModel):
        yield from findings(value, path)
    elif isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _inside(element, path.at(index))


def _is_set(value: Any) -> bool:
    """Whether a value says more than proto3's default, which is the same as absence."""
    if isinstance(value, BaseModel):
        return any(_is_set(getattr(value, name)) for name, _ in _given(value))
    if isinstance(value, tuple):
        return any(map(_is_set, value))
    return bool(value)


def joined(violations: Iterable[FieldViolation]) -> InvalidArgument:
    """Several problems as one 400, bounded in length."""
    return InvalidArgument.of(_limited(list(violations)))
