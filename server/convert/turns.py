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

_ROLES = {
    **dict.fromkeys(("user", "function", "tool", "context", "user_context"), "user"),
    **dict.fromkeys(("model", "assistant"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""Who speaks, by the role in lower case: the roles of the Gemini API, old and new, and those of other formats. What is
told as context comes from the user: it must not outweigh what the system instructs."""
_BETWEEN_TURNS = {"user": "\n", "assistant": "", "system": "\n\n"}
"""What joins neighbours of one role: streamed chats send the model's answer in pieces, one content per chunk."""

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


def turns_of(
    contents: Sequence[Content],
    control_texts: Sequence[str],
    reopen: Reopen,
    *,
    late_system: bool = False,
    counting: bool = False,
) -> list[Turn]:
    """The conversation, neighbours having different roles: user, assistant, and system for its beginning and, with
    ``late_system``, for what comes later; else that is what the user says.

    Raises ``InvalidArgument`` naming every content that cannot be a turn. With ``counting`` results without a call are
    text.
    """
    if not contents:
        raise joined([problem("contents", "contents is not specified")])
    problems = _problems(contents, control_texts)
    named = [found.violation() for found in islice(problems, MAX_NAMED)]
    if named:
        raise joined(named, more=sum(1 for _ in problems))
    thoughts = _Thoughts(reopen)
    turns = [_turn(content, f"contents[{index}]", thoughts) for index, content in enumerate(contents)]
    shown_turns = [turn for turn in _merged(turns) if turn.shown]
    return _settled(_merged(_with_system(shown_turns, late_system)), counting)


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
        return FieldViolation(field, self.text) if self.field == "role" else problem(field, self.text)


def _problems(contents: Sequence[Content], control_texts: Sequence[str]) -> Iterator[_Problem]:
    for index, content in enumerate(contents):
        role = _role(content)
        if not role:
            text = f"{shown(content.role)} is no role. Please use a valid role: {', '.join(_ROLES)}."
            yield _Problem(text, "role", index)
        if not content.parts:
            yield _Problem("contents.parts must not be empty.", "parts", index)
        for place, part in enumerate(content.parts):
            for field, text in _part_problems(part, role, control_texts):
                yield _Problem(text, field, index, place)


def _part_problems(part: Part, role: str, control_texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The field within the part, and a sentence; ``role`` is "" for an unknown one."""
    if not part.has_data:
        yield "data", _NO_DATA
    call, response = part.function_call, part.function_response
    if call is not None:
        yield from _function_problems("function_call", call.name, role in ("assistant", ""), role)
        if call.name and not NAME.fullmatch(call.name):
            yield "function_call.name", f"{shown(call.name)}: {BAD_NAME}"
        elif may_become_control(call.name, control_texts):
            yield "function_call.name", f"{shown(call.name)} contains a control token of the model; rename it."
        yield from (("function_call", text) for text in data_problems(call.args, control_texts))
    if response is not None:
        # The model is shown the name of the call: adapters write ids into the name of the result.
        yield from _function_problems("function_response", response.name, role in ("user", ""), role)
        # Results are shown as text, in which nothing becomes a control token.
        yield from (("function_response", text) for text in data_problems(response.response, ()))


def _function_problems(kind: str, name: str, fits: bool, role: str) -> Iterator[tuple[str, str]]:
    if not name:
        yield f"{kind}.name", "Name cannot be empty."
    if not fits:
        yield kind, f"is not what the role {role} can say: models call, users respond."


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


def _role(content: Content) -> str:
    """Who speaks; "" for an unknown role."""
    return _ROLES.get(content.role.lower() or "user", "")


def _turn(content: Content, path: str, thoughts: _Thoughts) -> Turn:
    said = [(place, part) for place, part in enumerate(content.parts) if not part.thought]
    responses = ((place, part.function_response) for place, part in said)
    return Turn(
        _role(content),
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


def _with_system(turns: Sequence[Turn], late_system: bool) -> list[Turn]:
    """The turns of the system as turns of the user, except at the beginning and where the template shows them. Between
    calls and their results no template does."""
    if all(turn.role == "system" for turn in turns):  # there must be something to answer
        return [replace(turn, role="user") for turn in turns]
    return [
        turn
        if turn.role != "system" or before is None or (late_system and not before.calls)
        else replace(turn, role="user")
        for before, turn in zip([None, *turns], turns, strict=False)
    ]


def _settled(turns: Sequence[Turn], counting: bool) -> list[Turn]:
    """Results in the order of their calls: by id, else by name and order. Raises ``InvalidArgument`` for results that
    answer no call, which become text with ``counting``."""
    unmatched: list[tuple[Result, list[FunctionCall] | None]] = []
    settled: list[Turn] = []
    for turn in turns:
        calls = settled[-1].calls if settled else ()
        places = _places(turn.results, calls)
        lone = [result for index, result in enumerate(turn.results) if index not in places]
        if lone:
            taken = set(places.values())
            asked = [call for place, call in enumerate(calls) if place not in taken] if calls else None
            unmatched += ((result, asked) for result in lone)
            told = [f"{result.name} returned {result.text}." for result in lone]
            turn = replace(turn, text="\n".join([*told, *filter(None, [turn.text])]))
        results = [replace(turn.results[index], call=place) for index, place in places.items()]
        settled.append(replace(turn, results=tuple(sorted(results, key=lambda result: result.call))))
    if unmatched and not counting:
        named = []
        for result, asked in unmatched[:MAX_NAMED]:
            given, *names = (
                shown(one.name) + (f" (id {shown(one.id)})" if one.id else "") for one in (result, *(asked or ())[:8])
            )
            text = f"{given} answers none of the calls that are open: {', '.join(names) or 'none is'}. {_NO_CALL}"
            named.append(FieldViolation(result.path, _NO_CALL) if asked is None else problem(result.path, text))
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
    # Adapters from other formats make new ids, or write the id of a call into the name of its result.
    left = [index for index in range(len(results)) if index not in found]
    taken = set(found.values())
    unanswered = [place for place in range(len(calls)) if place not in taken]
    return found | dict(zip(left, unanswered, strict=True)) if len(left) == len(unanswered) else found
