"""Compiles the grammar that an answer must follow: in child processes, within limits, and cached.

llguidance compiles most schemas in milliseconds, but which take minutes and gigabytes cannot be known in advance, and a
compilation cannot be interrupted. So it runs in a child that may be killed (`server/offload`), and so do the checks of
finished answers. What runs there is `enforced`, `chosen`, `checked_tool_call_grammar`, `checkable_all` and
`first_violation`.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from server.convert.tools import Tools
from server.errors import FieldViolation, InvalidArgument, ResourceExhausted
from server.families.family import Family
from server.families.tool_call_reader import ToolCall
from server.grammar.answer_check import checkable_all, first_violation
from server.grammar.llguidance import chosen, enforced, load
from server.grammar.response_format import ENUM, answer_form
from server.grammar.schema_dialects import JSON_PARAMETERS, JSON_SCHEMA, OPENAPI, PARAMETERS, SchemaDialect
from server.grammar.tool_calls import checked_tool_call_grammar, free_arguments
from server.observability.logs import log
from server.offload.children import ChildDied, ChildProcesses, JobFailed, TookTooLong, TookTooMuch
from server.wire.generation import GenerationConfig
from server.wire.json_schema import check_size
from server.wire.paths import camel
from server.wire.support import joined

COMPILE_SECONDS = 2.0
"""For a grammar, and for the check of an answer."""
WAIT_SECONDS = 3.5
"""For a free child. A caller may wait for one job of every other caller, so this is longer than a job."""
CHILDREN = 2
MEMORY_BYTES = 256 * 1024**2
REMEMBERED_BYTES = 20_000_000
UNCHECKED = " (unchecked)"
"""Follows the path of what is neither enforced nor checked."""
MAX_PATH = 256
"""Characters of a path within a schema that are shown."""

_BUSY = "Too many schemas are being compiled. Please try again later."
_DIED = "The schema could not be compiled now. Please try again later."


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """What an answer must follow: ``text`` is the grammar. ``has_form`` says that plain text follows a schema; a call
    is then told from it by the text that it begins with, one of ``call_starts``, or else by its family's marker.

    ``ignored`` are the JSON paths of what the grammar does not enforce, or of a form that no answer can have.
    ``answer_check`` and ``call_checks``, by the name of the function, are what finished answers are checked with.
    """

    text: str
    has_form: bool = False
    call_starts: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    answer_check: str = ""
    is_json: bool = True
    call_checks: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_checks(self) -> bool:
        """Whether a finished answer has to be checked."""
        return bool(self.answer_check or self.call_checks)


class _Given(NamedTuple):
    """A schema of the caller, and what a grammar does not enforce of it."""

    schema: Any
    path: str
    dialect: SchemaDialect
    unenforced: Mapping[str, bool]


class GrammarCompiler:
    """Turns schemas and functions into grammars. ``owner`` identifies the caller: callers take turns.

    A grammar that takes more than ``seconds`` to compile, or more than ``MEMORY_BYTES``, is refused, and so is a caller
    who waits more than ``patience`` seconds for one of the ``number`` children. Results are cached, and so are refusals
    that a retry would not change. With ``strict`` what a grammar cannot enforce is refused too.
    """

    def __init__(
        self, *, seconds: float = COMPILE_SECONDS, patience: float = WAIT_SECONDS, number: int = CHILDREN
    ) -> None:
        self._seconds = seconds
        self._patience = patience
        self._children = ChildProcesses(number, MEMORY_BYTES, _BUSY, load)
        self._known: OrderedDict[bytes, Any] = OrderedDict()
        self._bytes = 0
        self._making: dict[tuple[str, bytes], asyncio.Task[Any]] = {}

    async def answer(self, config: GenerationConfig, owner: str = "", strict: bool = False) -> AnswerGrammar | None:
        """The grammar that the answer's text must follow, None for free text.

        Raises ``InvalidArgument`` naming the field, and ``ResourceExhausted`` while too many are compiled.
        """
        form = answer_form(config)
        if form is None:
            return None
        check_size(form.schema, form.field)
        work = chosen if form.mime_type == ENUM else enforced
        text, unenforced = await self._once(owner, form.field, work, form.schema, form.field, form.openapi)
        given = _Given(form.schema, form.field, OPENAPI if form.openapi else JSON_SCHEMA, unenforced)
        [check], ignored = await self._checks([given], owner, strict)
        return AnswerGrammar(text, True, (), ignored, check, is_json=form.mime_type != ENUM)

    async def calls(
        self,
        tools: Tools,
        family: Family,
        atom_ids: Mapping[str, int],
        owner: str = "",
        config: GenerationConfig | None = None,
        strict: bool = False,
    ) -> AnswerGrammar:
        """The grammar of an answer that may call functions, or else follow the form that ``config`` asks for. Schemas
        of arguments constrain as far as they can.

        Raises as `answer` does.
        """
        form = answer_form(config) if config is not None else None
        answer = await self.answer(config, owner, strict) if form and config and not tools.must_call else None
        given_answer = answer.text if answer else ""
        work, arguments = checked_tool_call_grammar, (family, dict(atom_ids), given_answer)
        try:
            text, unenforced, starts = await self._once(owner, "tools", work, tools, *arguments)
        except InvalidArgument:
            text, _, starts = await self._once(owner, "tools", work, free_arguments(tools), *arguments)
            unenforced = [{"": True} if function.parameters else {} for function in tools.allowed]
        schemas = [
            _Given(function.parameters, function.path, JSON_PARAMETERS if function.is_json_schema else PARAMETERS, left)
            for function, left in zip(tools.allowed, unenforced, strict=True)
        ]
        checks, ignored = await self._checks(schemas, owner, strict)
        call_checks = {function.name: check for function, check in zip(tools.allowed, checks, strict=True) if check}
        if answer is not None:
            return replace(
                answer, text=text, call_starts=tuple(starts), ignored=answer.ignored + ignored, call_checks=call_checks
            )
        unused = (_json_path(form.field),) if form is not None else ()  # who must call cannot answer
        return AnswerGrammar(text, ignored=unused + ignored, call_checks=call_checks)

    async def remark(self, grammar: AnswerGrammar, text: str, calls: Sequence[ToolCall], owner: str = "") -> str:
        """A sentence on what a finished answer does not satisfy of its schemas, or why that is not known; "" if there
        is nothing to say."""
        checks = [
            (grammar.call_checks[call.name], json.dumps(call.args), f"arguments of {call.name} do")
            for call in calls
            if call.name in grammar.call_checks
        ]
        if grammar.answer_check and not calls:
            checks = [(grammar.answer_check, text if grammar.is_json else json.dumps(text), "answer does")]
        if not checks:
            return ""
        pairs = [(schema, value) for schema, value, _ in checks]
        try:
            found = await self._children.run(
                first_violation, pairs, owner=owner, seconds=self._seconds, patience=self._patience
            )
        except (TookTooLong, TookTooMuch):
            return "The answer was not checked: checking it takes too much."
        except ResourceExhausted:
            return "The answer was not checked: too many are being checked."
        except (JobFailed, ChildDied) as failure:
            log.error("an answer could not be checked", reason=str(failure))
            return "The answer was not checked: the server's log has the reason."
        if found is None:
            return ""
        index, keyword, place = found
        if not keyword:
            return "The answer is no complete JSON."
        return f'The {checks[index][2]} not satisfy "{keyword}"' + (f" at {place}." if place else ".")

    async def _checks(self, schemas: Sequence[_Given], owner: str, strict: bool) -> tuple[list[str], tuple[str, ...]]:
        """What answers are checked with for each schema, "" where there is nothing to check; and the JSON paths of what
        is not enforced, marked where it is not checked either. Raises ``InvalidArgument`` with ``strict``."""
        places = [given.path + path for given in schemas for path in given.unenforced]
        if places and strict:
            reason = "cannot be enforced; leave it out, or check the answer yourself"
            raise joined([FieldViolation(place, f"{place}: {reason}") for place in places])
        asked = {index: given for index, given in enumerate(schemas) if any(given.unenforced.values())}
        found: dict[int, Any] = {}
        if asked:
            work = [(given.schema, given.dialect) for given in asked.values()]
            try:
                made = await self._once(owner, "schema", checkable_all, work)
            except (InvalidArgument, ResourceExhausted):  # the grammar is made: the request does not fail
                made = [("", [])] * len(work)
            found = dict(zip(asked, made, strict=True))
        checks, ignored = [], list[str]()
        for index, given in enumerate(schemas):
            check, unchecked = found.get(index, ("", []))
            checked = {path for path, can_be in given.unenforced.items() if can_be and check and path not in unchecked}
            checks.append(check if checked else "")
            ignored += (
                _json_path(given.path) + path[:MAX_PATH] + ("" if path in checked else UNCHECKED)
                for path in given.unenforced
            )
        return checks, tuple(ignored)

    async def close(self) -> None:
        """End the children."""
        await self._children.close()

    async def _once(self, owner: str, field: str, work: Callable[..., Any], *arguments: Any) -> Any:
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
        return outcome

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


def _json_path(path: str) -> str:
    """A snake_case path of a field as its JSON path."""
    return ".".join(map(camel, path.split(".")))


def _size(outcome: Any) -> int:
    return 1000 + len(msgspec.msgpack.encode(outcome))
