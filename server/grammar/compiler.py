"""Compiles the grammar that an answer must follow: in child processes, within limits, and cached.

llguidance compiles most schemas in milliseconds, but which take minutes and gigabytes cannot be known in advance, and a
compilation cannot be interrupted. So it runs in a child that may be killed (`server/offload`). What runs there is
`enforced`, `chosen` and `checked_tool_call_grammar`.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from server.convert.tools import Tools
from server.errors import FieldViolation, InvalidArgument, ResourceExhausted
from server.families.family import Family
from server.grammar.llguidance import chosen, enforced, load
from server.grammar.response_format import ENUM, answer_form
from server.grammar.tool_calls import checked_tool_call_grammar, free_arguments
from server.observability.logs import log
from server.offload.children import ChildDied, ChildProcesses, JobFailed, TookTooLong, TookTooMuch
from server.wire.generation import GenerationConfig
from server.wire.json_schema import check_size

COMPILE_SECONDS = 2.0
WAIT_SECONDS = 3.5
"""For a free child. A caller may wait for one job of every other caller, so this is longer than a job."""
CHILDREN = 2
MEMORY_BYTES = 256 * 1024**2
REMEMBERED_BYTES = 20_000_000

_BUSY = "Too many schemas are being compiled. Please try again later."
_DIED = "The schema could not be compiled now. Please try again later."


class GrammarCompiler:
    """Turns schemas and functions into grammars. ``owner`` identifies the caller: callers take turns.

    A grammar that takes more than ``seconds`` to compile, or more than ``MEMORY_BYTES``, is refused, and so is a caller
    who waits more than ``patience`` seconds for one of the ``number`` children. Results are cached, and so are refusals
    that a retry would not change.
    """

    def __init__(
        self, *, seconds: float = COMPILE_SECONDS, patience: float = WAIT_SECONDS, number: int = CHILDREN
    ) -> None:
        self._seconds = seconds
        self._patience = patience
        self._children = ChildProcesses(number, MEMORY_BYTES, _BUSY, load)
        self._known: OrderedDict[bytes, str | _Refusal] = OrderedDict()
        self._bytes = 0
        self._making: dict[tuple[str, bytes], asyncio.Task[Any]] = {}

    async def answer(self, config: GenerationConfig, owner: str = "") -> str | None:
        """The grammar that the answer's text must follow, None for free text.

        Raises ``InvalidArgument`` naming the field, and ``ResourceExhausted`` while too many are compiled.
        """
        form = answer_form(config)
        if form is None:
            return None
        check_size(form.schema, form.field)
        work = chosen if form.mime_type == ENUM else enforced
        return await self._once(owner, form.field, work, form.schema, form.field, form.openapi)

    async def calls(self, tools: Tools, family: Family, atom_ids: Mapping[str, int], owner: str = "") -> str:
        """The grammar of an answer that may call functions. Schemas of arguments constrain as far as they can.

        Raises ``ResourceExhausted``.
        """
        try:
            return await self._once(owner, "tools", checked_tool_call_grammar, tools, family, dict(atom_ids))
        except InvalidArgument:
            return await self._once(
                owner, "tools", checked_tool_call_grammar, free_arguments(tools), family, dict(atom_ids)
            )

    async def close(self) -> None:
        """End the children."""
        await self._children.close()

    async def _once(self, owner: str, field: str, work: Callable[..., Any], *arguments: Any) -> str:
        """The result of ``work``: from the cache, shared with this owner's requests that wait for it, or computed."""
        key = sha256(pickle.dumps((work, arguments))).digest()
        outcome: Any = self._known.get(key)
        if outcome is None:
            making = self._making.get((owner, key))
            if making is None:
                making = asyncio.create_task(self._made(owner, field, key, work, *arguments))
                self._making[owner, key] = making
                making.add_done_callback(lambda _: self._making.pop((owner, key)))
            await asyncio.wait([making])  # a cancelled caller does not cancel the others
            outcome = making.result()
        else:
            self._known.move_to_end(key)
        if isinstance(outcome, _Refusal):
            raise InvalidArgument(*outcome)
        if isinstance(outcome, ResourceExhausted):
            raise ResourceExhausted(outcome.message)
        return str(outcome)

    async def _made(self, owner: str, field: str, key: bytes, work: Callable[..., Any], *arguments: Any) -> Any:
        """The grammar, or why there is none. Only refusals that a retry would get again are cached."""
        try:
            outcome: Any = await self._children.run(
                work, *arguments, owner=owner, seconds=self._seconds, patience=self._patience
            )
        except InvalidArgument as refusal:
            outcome = _Refusal(refusal.message, refusal.violations)
        except TookTooMuch:
            outcome = _too_costly(field, f"{MEMORY_BYTES >> 20} MiB of memory")
        except JobFailed as failure:
            log.error("a schema could not be compiled", field=field, reason=str(failure))
            outcome = _refusal(field, "this cannot be enforced; the server's log has the reason")
        except TookTooLong:
            return _too_costly(field, f"{self._seconds:g} seconds")
        except ResourceExhausted as busy:
            return ResourceExhausted(busy.message)
        except ChildDied as death:
            log.error("a schema could not be compiled", reason=str(death))
            return ResourceExhausted(_DIED)
        self._bytes += 0 if key in self._known else _size(outcome)
        self._known[key] = outcome
        while len(self._known) > 1 and self._bytes > REMEMBERED_BYTES:
            self._bytes -= _size(self._known.popitem(last=False)[1])
        return outcome


class _Refusal(NamedTuple):
    """What an ``InvalidArgument`` is made of. The exception itself would keep its traceback and all it refers to."""

    message: str
    violations: tuple[FieldViolation, ...]


def _refusal(field: str, reason: str) -> _Refusal:
    text = f"{field}: {reason}"
    return _Refusal(text, (FieldViolation(field, text),))


def _too_costly(field: str, limit: str) -> _Refusal:
    return _refusal(field, f"compiling it takes more than {limit}; send a simpler one")


def _size(outcome: str | _Refusal) -> int:
    texts = [outcome] if isinstance(outcome, str) else [outcome.message, *sum(outcome.violations, ())]
    return 1000 + sum(map(sys.getsizeof, texts))
