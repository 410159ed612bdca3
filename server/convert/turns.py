"""A conversation as turns: neighbours of one role are one turn, and every function response has found its call."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, groupby, islice
from typing import NamedTuple

from server.convert.tools import BAD_NAME, NAME, data_problems, may_become_control
from server.errors import FieldViolation
from server.wire.content import Content, FunctionCall, Part
from server.wire.fields import shown
from server.wire.requests import GenerateContentRequest
from server.wire.support import MAX_NAMED, joined

MAX_CONTENTS = 32_768
MAX_PARTS = 65_536
"""Generous: chats of SDKs keep every chunk of a streamed answer as a content."""
MAX_THOUGHT_CHARACTERS = 20 * 1024**2
"""A signature is short, but the thoughts in it may be long."""

Reopen = Callable[[bytes], str | None]
"""The thoughts in a signature that this server made, None for any other bytes."""

_ROLES = {"": "user", "user": "user", "function": "user", "model": "assistant"}
_BETWEEN_TURNS = {"user": "\n", "assistant": ""}
"""What joins neighbours of one role: streamed chats send the model's answer in pieces, one content per chunk."""

_NO_ROLE = "Please use a valid role: user, model."
_NO_DATA = "required oneof field 'data' must have one initialized field"
_NO_CALL = (
    "Please ensure that function response turn comes immediately after a function call turn. And the number of "
    "function response parts should be equal to number of function call parts of the function call turn."
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a function returned, as JSON; ``call`` is the index of its call in the turn before."""

    path: str
    id: str
    name: str
    text: str
    call: int = -1


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says in one turn. ``thoughts`` came before it; a turn of thoughts alone is not ``shown``."""

    role: str
    text: str = ""
    calls: tuple[FunctionCall, ...] = ()
    results: tuple[Result, ...] = ()
    thoughts: str = ""
    shown: bool = True


def check_counts(request: GenerateContentRequest) -> None:
    """Raises ``InvalidArgument`` for a conversation of too many pieces."""
    parts = sum(len(content.parts) for content in request.contents)
    if request.system_instruction is not None:
        parts += len(request.system_instruction.parts)
    for found, what, most in ((len(request.contents), "contents", MAX_CONTENTS), (parts, "parts", MAX_PARTS)):
        if found > most:
            reason = f"there are {found} {what}, but at most {most} are read; join those of one role, or send fewer."
            raise joined([problem("contents", reason)])


def turns_of(contents: Sequence[Content], control_texts: Sequence[str], reopen: Reopen) -> list[Turn]:
    """The conversation, roles alternating. Raises ``InvalidArgument`` naming every content that cannot be a turn."""
    if not contents:
        raise joined([problem("contents", "contents is not specified")])
    problems = _problems(contents, control_texts)
    named = [found.violation() for found in islice(problems, MAX_NAMED)]
    if named:
        raise joined(named, more=sum(1 for _ in problems))
    thoughts = _Thoughts(reopen)
    turns = [_turn(content, f"contents[{index}]", thoughts) for index, content in enumerate(contents)]
    return _settled(_merged([turn for turn in _merged(turns) if turn.shown]))


def problem(field: str, text: str) -> FieldViolation:
    """A violation in the words of the real service."""
    return FieldViolation(field, f"* GenerateContentRequest.{field}: {text}")


class _Problem(NamedTuple):
    """What is wrong with a content, or with a part of it; formatted only for the few that are reported."""

    text: str
    field: str
    content: int
    part: int = -1

    def violation(self) -> FieldViolation:
        part = "" if self.part < 0 else f".parts[{self.part}]"
        field = f"contents[{self.content}]{part}.{self.field}"
        return FieldViolation(field, self.text) if self.text == _NO_ROLE else problem(field, self.text)


def _problems(contents: Sequence[Content], control_texts: Sequence[str]) -> Iterator[_Problem]:
    for index, content in enumerate(contents):
        if content.role not in _ROLES:
            yield _Problem(_NO_ROLE, "role", index)
        if not content.parts:
            yield _Problem("contents.parts must not be empty.", "parts", index)
        for place, part in enumerate(content.parts):
            for field, text in _part_problems(part, content.role, control_texts):
                yield _Problem(text, field, index, place)


def _part_problems(part: Part, role: str, control_texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The field within the part, and a sentence."""
    if not part.has_data:
        yield "data", _NO_DATA
    call, response = part.function_call, part.function_response
    if call is not None:
        yield from _function_problems("function_call", call.name, role == "model", role, control_texts)
        yield from (("function_call", text) for text in data_problems(call.args, control_texts))
    if response is not None:
        yield from _function_problems("function_response", response.name, role != "model", role, control_texts)
        # Results are shown as text, in which nothing becomes a control token.
        yield from (("function_response", text) for text in data_problems(response.response, ()))


def _function_problems(
    kind: str, name: str, fits: bool, role: str, control_texts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    if not name:
        yield f"{kind}.name", "Name cannot be empty."
    elif not NAME.fullmatch(name):
        yield f"{kind}.name", f"{shown(name)}: {BAD_NAME}"
    elif may_become_control(name, control_texts):
        yield f"{kind}.name", f"{shown(name)} contains a control token of the model; rename it."
    if not fits:
        yield kind, f"is not what the role {role or 'user'} can say: models call, users respond."


class _Thoughts:
    """The thoughts in the signatures of one conversation. Clients repeat signatures: each is opened once."""

    def __init__(self, reopen: Reopen) -> None:
        self._reopen = lru_cache(maxsize=None)(reopen)
        self._left = MAX_THOUGHT_CHARACTERS

    def of(self, content: Content) -> str:
        """Those of one content. Raises ``InvalidArgument`` where all of the conversation are too long together."""
        signatures = dict.fromkeys(part.thought_signature for part in content.parts if part.thought_signature)
        thoughts = dict.fromkeys(text for text in map(self._reopen, signatures) if text)
        self._left -= sum(map(len, thoughts))
        if self._left < 0:
            reason = f"its signatures bring back more than {MAX_THOUGHT_CHARACTERS} characters of thoughts; send fewer."
            raise joined([problem("contents", reason)])
        return "\n".join(thoughts)


def _turn(content: Content, path: str, thoughts: _Thoughts) -> Turn:
    said = [(place, part) for place, part in enumerate(content.parts) if not part.thought]
    responses = ((place, part.function_response) for place, part in said)
    return Turn(
        _ROLES[content.role],
        "".join(part.text or "" for _, part in said),
        tuple(part.function_call for _, part in said if part.function_call),
        tuple(
            Result(
                f"{path}.parts[{place}].function_response",
                response.id,
                response.name,
                json.dumps(response.response or {}, ensure_ascii=False),
            )
            for place, response in responses
            if response
        ),
        thoughts.of(content),
        bool(said),
    )


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role as one turn: templates want roles to alternate. A chat may hold thousands, so nothing here
    is joined one by one."""
    merged = []
    for role, group in groupby(turns, key=lambda turn: turn.role):
        run = list(group)
        merged.append(
            Turn(
                role,
                _BETWEEN_TURNS[role].join(turn.text for turn in run if turn.text),
                tuple(chain.from_iterable(turn.calls for turn in run)),
                tuple(chain.from_iterable(turn.results for turn in run)),
                "\n".join(dict.fromkeys(turn.thoughts for turn in run if turn.thoughts)),
                any(turn.shown for turn in run),
            )
        )
    return merged


def _settled(turns: Sequence[Turn]) -> list[Turn]:
    """Results in the order of their calls: by id, else by name and order. Raises ``InvalidArgument``."""
    unmatched: list[tuple[Result, Sequence[FunctionCall]]] = []
    settled: list[Turn] = []
    for turn in turns:
        calls = settled[-1].calls if settled else ()
        places = _places(turn.results, calls)
        unmatched += ((result, calls) for index, result in enumerate(turn.results) if index not in places)
        results = [replace(turn.results[index], call=place) for index, place in places.items()]
        settled.append(replace(turn, results=tuple(sorted(results, key=lambda result: result.call))))
    if unmatched:
        named = []
        for result, asked in unmatched[:MAX_NAMED]:
            names = ", ".join(repr(call.name) for call in asked[:8])
            text = f"{result.name!r} answers none of the calls of the turn before: {names}. {_NO_CALL}"
            named.append(problem(result.path, text) if asked else FieldViolation(result.path, _NO_CALL))
        raise joined(named, more=len(unmatched[MAX_NAMED:]))
    return settled


def _places(results: Sequence[Result], calls: Sequence[FunctionCall]) -> dict[int, int]:
    """The index of the call that each result answers, by the index of the result; without those that answer none."""
    by_id: dict[str, deque[int]] = defaultdict(deque)
    for place, call in enumerate(calls):
        by_id[call.id].append(place)
    found = {
        index: by_id[result.id].popleft() for index, result in enumerate(results) if result.id and by_id.get(result.id)
    }
    by_name: dict[tuple[str, bool], deque[int]] = defaultdict(deque)
    taken = set(found.values())
    for place, call in enumerate(calls):
        if place not in taken:
            by_name[call.name, bool(call.id)].append(place)
    for index, result in enumerate(results):
        if index not in found:
            # Where both have ids, these differ.
            kinds = (False,) if result.id else (False, True)
            waiting = [places for kind in kinds if (places := by_name.get((result.name, kind)))]
            if waiting:
                found[index] = min(waiting, key=lambda places: places[0]).popleft()
    return found
