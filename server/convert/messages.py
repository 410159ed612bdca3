"""Contents to the turns that chat templates know: system, user and assistant, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from server.convert.tokens import Message
from server.errors import FieldViolation
from server.wire.content import Content, Part
from server.wire.requests import GenerateContentRequest
from server.wire.support import joined

_ROLES = {"": "user", "user": "user", "function": "user", "model": "assistant"}
_BETWEEN_TURNS = {"user": "\n", "assistant": ""}
"""What joins neighbours of one role: streamed chats send the model's answer in pieces, one content per chunk."""


class _Turn(NamedTuple):
    role: str
    text: str


def chat_messages(request: GenerateContentRequest, has_system_role: bool) -> list[Message]:
    """The conversation of ``request``; the system instruction is folded into the first user turn where the template
    has no system role. Raises ``InvalidArgument`` naming every content that cannot be a turn."""
    problems = list(_problems(request.contents))
    if problems:
        raise joined(problems)
    turns = _merged([turn for content in request.contents for turn in _turns(content)])
    system = _text(request.system_instruction.parts) if request.system_instruction else ""
    if system:
        turns = [_Turn("system", system), *turns] if has_system_role else _folded(system, turns)
    return [Message(role=turn.role, content=turn.text) for turn in turns]


def _problems(contents: Sequence[Content]) -> Iterator[FieldViolation]:
    if not contents:
        yield _problem("contents", "contents is not specified")
    for index, content in enumerate(contents):
        path = f"contents[{index}]"
        if content.role not in _ROLES:
            yield FieldViolation(f"{path}.role", "Please use a valid role: user, model.")
        if not content.parts:
            yield _problem(f"{path}.parts", "contents.parts must not be empty.")
        for place, part in enumerate(content.parts):
            if not part.has_data:
                required = "required oneof field 'data' must have one initialized field"
                yield _problem(f"{path}.parts[{place}].data", required)


def _problem(field: str, text: str) -> FieldViolation:
    return FieldViolation(field, f"* GenerateContentRequest.{field}: {text}")


def _turns(content: Content) -> list[_Turn]:
    """One turn, or none where a content holds nothing but thoughts: the model is not shown those again."""
    shown = [part for part in content.parts if not part.thought]
    return [_Turn(_ROLES[content.role], _text(shown))] if shown else []


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text or "" for part in parts if not part.thought)


def _merged(turns: Sequence[_Turn]) -> list[_Turn]:
    """Templates want roles to alternate."""
    merged: list[_Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = _Turn(turn.role, merged[-1].text + _BETWEEN_TURNS[turn.role] + turn.text)
        else:
            merged.append(turn)
    return merged


def _folded(system: str, turns: list[_Turn]) -> list[_Turn]:
    if turns and turns[0].role == "user":
        return [_Turn("user", f"{system}\n\n{turns[0].text}"), *turns[1:]]
    return [_Turn("user", system), *turns]
