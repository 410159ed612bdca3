"""A conversation as turns: neighbours of one role are one turn, and every function's answer has found its call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.convert.tools import data_problems
from server.errors import FieldViolation
from server.wire.content import Content, FunctionCall, FunctionResponse, Part
from server.wire.support import joined

Reopen = Callable[[bytes], str | None]
"""The thoughts in a signature that this server made, None for any other bytes."""

_ROLES = {"": "user", "user": "user", "function": "user", "model": "assistant"}
_BETWEEN_TURNS = {"user": "\n", "assistant": ""}
"""What joins neighbours of one role: streamed chats send the model's answer in pieces, one content per chunk."""

_NO_DATA = "required oneof field 'data' must have one initialized field"
_NO_CALL = (
    "Please ensure that function response turn comes immediately after a function call turn. And the number of "
    "function response parts should be equal to number of function call parts of the function call turn."
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a function answered, as JSON; ``call`` is the place of its call among those of the turn before."""

    path: str
    id: str
    name: str
    text: str
    call: int = -1


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says at once. ``thoughts`` stood before it; a turn of thoughts alone is not ``shown``."""

    role: str
    text: str = ""
    calls: tuple[FunctionCall, ...] = ()
    results: tuple[Result, ...] = ()
    thoughts: str = ""
    shown: bool = True


def turns_of(contents: Sequence[Content], control_texts: Sequence[str], reopen: Reopen) -> list[Turn]:
    """The conversation, roles alternating. Raises ``InvalidArgument`` naming every content that cannot be a turn."""
    problems = list(_problems(contents, control_texts))
    if problems:
        raise joined(problems)
    turns = [_turn(content, f"contents[{index}]", reopen) for index, content in enumerate(contents)]
    return _settled(_merged([turn for turn in _merged(turns) if turn.shown]))


def problem(field: str, text: str) -> FieldViolation:
    """A violation in the words of the real service."""
    return FieldViolation(field, f"* GenerateContentRequest.{field}: {text}")


def _problems(contents: Sequence[Content], control_texts: Sequence[str]) -> Iterator[FieldViolation]:
    if not contents:
        yield problem("contents", "contents is not specified")
    for index, content in enumerate(contents):
        path = f"contents[{index}]"
        if content.role not in _ROLES:
            yield FieldViolation(f"{path}.role", "Please use a valid role: user, model.")
        if not content.parts:
            yield problem(f"{path}.parts", "contents.parts must not be empty.")
        for place, part in enumerate(content.parts):
            yield from _part_problems(f"{path}.parts[{place}]", part, content.role, control_texts)


def _part_problems(path: str, part: Part, role: str, control_texts: Sequence[str]) -> Iterator[FieldViolation]:
    if not part.has_data:
        yield problem(f"{path}.data", _NO_DATA)
    spoken: list[tuple[str, FunctionCall | FunctionResponse | None, Any, bool]] = [
        ("function_call", part.function_call, part.function_call and part.function_call.args, role == "model"),
        (
            "function_response",
            part.function_response,
            part.function_response and part.function_response.response,
            role != "model",
        ),
    ]
    for kind, function, data, fits in spoken:
        if function is None:
            continue
        if not function.name:
            yield problem(f"{path}.{kind}.name", "Name cannot be empty.")
        if not fits:
            yield problem(
                f"{path}.{kind}", f"is not what the role {role or 'user'} can say: models call, users respond."
            )
        for text in data_problems(data, control_texts if kind == "function_call" else ()):
            yield problem(f"{path}.{kind}", text)


def _turn(content: Content, path: str, reopen: Reopen) -> Turn:
    shown = [(place, part) for place, part in enumerate(content.parts) if not part.thought]
    thoughts = [reopen(part.thought_signature) for part in content.parts if part.thought_signature]
    return Turn(
        _ROLES[content.role],
        "".join(part.text or "" for _, part in shown),
        tuple(part.function_call for _, part in shown if part.function_call),
        tuple(
            _result(f"{path}.parts[{place}]", part.function_response) for place, part in shown if part.function_response
        ),
        "\n".join(dict.fromkeys(text for text in thoughts if text)),
        bool(shown),
    )


def _result(path: str, response: FunctionResponse) -> Result:
    text = json.dumps(response.response or {}, ensure_ascii=False)
    return Result(f"{path}.function_response", response.id, response.name, text)


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Templates want roles to alternate."""
    found: list[Turn] = []
    for turn in turns:
        if found and found[-1].role == turn.role:
            found[-1] = _both(found[-1], turn)
        else:
            found.append(turn)
    return found


def _both(first: Turn, second: Turn) -> Turn:
    between = _BETWEEN_TURNS[first.role] if first.text and second.text else ""
    return Turn(
        first.role,
        first.text + between + second.text,
        first.calls + second.calls,
        first.results + second.results,
        "\n".join(dict.fromkeys(text for text in (first.thoughts, second.thoughts) if text)),
        first.shown or second.shown,
    )


def _settled(turns: Sequence[Turn]) -> list[Turn]:
    """Results in the order of their calls: by id, else by name and order. Raises ``InvalidArgument``."""
    problems: list[FieldViolation] = []
    settled: list[Turn] = []
    for turn in turns:
        calls = settled[-1].calls if settled else ()
        settled.append(replace(turn, results=_matched(turn.results, calls, problems)) if turn.results else turn)
    if problems:
        raise joined(problems)
    return settled


def _matched(
    results: Sequence[Result], calls: Sequence[FunctionCall], problems: list[FieldViolation]
) -> tuple[Result, ...]:
    open_calls = dict(enumerate(calls))
    found: list[Result] = []
    for by_id in (True, False):
        for result in results:
            if any(other.path == result.path for other in found):
                continue
            place = next((at for at, call in open_calls.items() if _answers(result, call, by_id)), None)
            if place is not None:
                del open_calls[place]
                found.append(replace(result, call=place))
            elif not by_id:
                problems.append(_unmatched(result, calls))
    return tuple(sorted(found, key=lambda result: result.call))


def _answers(result: Result, call: FunctionCall, by_id: bool) -> bool:
    if by_id:
        return bool(result.id) and result.id == call.id
    return result.name == call.name and not (result.id and call.id)


def _unmatched(result: Result, calls: Sequence[FunctionCall]) -> FieldViolation:
    if not calls:
        return FieldViolation(result.path, _NO_CALL)
    names = ", ".join(repr(call.name) for call in calls[:8])
    return problem(
        result.path, f"{result.name[:128]!r} answers none of the calls of the turn before: {names}. {_NO_CALL}"
    )
