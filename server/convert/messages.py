"""Converts contents to the messages that chat templates know: system, user, assistant and tool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from server.convert.rendering import ChatMessage
from server.convert.turns import Reopen, Turn, check_counts, problem, turns_of
from server.families.family import Family
from server.families.tagged_calls import CASTOR
from server.wire.content import FunctionCall
from server.wire.requests import GenerateContentRequest
from server.wire.support import joined


def no_thoughts(_signature: bytes) -> None:
    """Opens no signature."""


def chat_messages(
    request: GenerateContentRequest,
    has_system_role: bool = True,
    *,
    family: Family = CASTOR,
    preamble: str = "",
    control_texts: Sequence[str] = (),
    reopen: Reopen = no_thoughts,
    late_system: bool = False,
    counting: bool = False,
) -> list[ChatMessage]:
    """The conversation of ``request``; the system instruction, followed by what the system says first in the contents
    and by ``preamble``, is folded into the first user turn where the template has no system role. ``late_system`` says
    that the template shows what the system says later; ``counting`` that the prompt is not to be answered.

    Raises ``InvalidArgument`` naming every content that cannot be a turn.
    """
    check_counts(request)
    turns = turns_of(request.contents, control_texts, reopen, late_system=late_system, counting=counting)
    instruction = request.system_instruction.parts if request.system_instruction else ()
    if any(part.function_call or part.function_response for part in instruction):
        raise joined([problem("system_instruction", "must be text, without function calls and responses.")])
    text = "".join(part.text or "" for part in instruction if not part.thought)
    opening = turns.pop(0).text if turns and turns[0].role == "system" else ""
    system = "\n\n".join(filter(None, (text, opening, preamble)))
    if system and not has_system_role:
        first = turns[0] if turns and turns[0].role == "user" else None
        text = f"{system}\n\n{first.text}" if first else system
        folded = Turn("user", text, first.calls, first.results) if first else Turn("user", text)
        turns = [folded, *(turns[1:] if first else turns)]
    written = _native(turns, family) if family.renders_tools else map(_in_words, turns, [None, *turns])
    start = [ChatMessage(role="system", content=system)] if system and has_system_role else []
    return [*start, *written]


def _in_words(turn: Turn, before: Turn | None) -> ChatMessage:
    """A turn for models whose template knows no functions: calls are written as Castor's own prompt asks, results in
    plain words. Small models repeat results that are marked up; asked to answer, they use them."""
    names = [before.calls[result.call].name for result in turn.results] if before else []
    results = [f"{name} returned {result.text}." for name, result in zip(names, turn.results, strict=True)]
    text = turn.text or ("Now answer my question." if results else "")
    return ChatMessage(role=turn.role, content="\n".join(filter(None, [*results, text, *map(_written, turn.calls)])))


def _written(call: FunctionCall) -> str:
    return CASTOR.call.write((call.name, json.dumps(call.args or {}, ensure_ascii=False)))


def _native(turns: Sequence[Turn], family: Family) -> Iterator[ChatMessage]:
    """Messages for templates that know functions. Calls are numbered, so that a prompt does not depend on the ids of
    clients."""
    count = 0
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if turn.role != "assistant":
            if turn.text or not turn.results:
                yield ChatMessage(role=turn.role, content=turn.text)
            continue
        tools = {
            result.call: ChatMessage(
                role="tool",
                content=result.text,
                name=turn.calls[result.call].name,
                tool_call_id=family.call.call_id.format(name=turn.calls[result.call].name, number=count + result.call),
            )
            for result in (following.results if following else ())
        }
        calls = list(enumerate(turn.calls))
        groups = [calls] if family.call.is_parallel or not calls else [[call] for call in calls]
        for place, group in enumerate(groups):
            spoken = turn if place == 0 else Turn(turn.role)
            yield _assistant(spoken, [(count + index, call) for index, call in group], family)
            yield from (tools[index] for index, _ in group if index in tools)
        count += len(calls)


def _assistant(turn: Turn, calls: Sequence[tuple[int, FunctionCall]], family: Family) -> ChatMessage:
    text, thoughts = turn.text, turn.thoughts
    if calls and not family.call.is_parallel:  # such templates have one slot for the text before a call
        text, thoughts = ("", f"{thoughts}\n{text}") if text and thoughts else (text, thoughts)
    message = ChatMessage(role="assistant", content=text)
    if calls:
        message["tool_calls"] = [
            {
                "id": family.call.call_id.format(name=call.name, number=number),
                "type": "function",
                "function": {"name": call.name, "arguments": call.args or {}},
            }
            for number, call in calls
        ]
    if thoughts:
        message[family.reasoning_key] = thoughts  # type: ignore[literal-required]
    return message
