"""The grammar that an answer must follow: checked off the event loop, within a deadline, and remembered.

llguidance compiles most schemas in milliseconds, but a compilation cannot be interrupted: sizes are capped first, a few
threads do the work, and who waits too long is refused while the thread finishes.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from threading import Lock
from typing import Any

from server.convert.form import ENUM, answer_form
from server.convert.grammars import choice_grammar, culprit, grammar_problem, json_grammar, schema_problem
from server.convert.schema import Schema, json_schema, openapi_schema, relaxed_schema
from server.convert.shape import check_size
from server.errors import InvalidArgument, ResourceExhausted
from server.wire.generation import GenerationConfig

DEADLINE_SECONDS = 5.0
MAX_WAITING = 64
REMEMBERED = 256
MAX_GRAMMAR_CHARACTERS = 1_000_000
MAX_REPAIRS = 50

_BUSY = "Too many schemas are being compiled. Please try again later."

Job = Callable[[], Any]
Conversion = Callable[[Any, str], Schema]


class GrammarCompiler:
    """Converts schemas and checks grammars.

    At most ``threads`` grammars compile at a time and ``MAX_WAITING`` wait; who has waited ``deadline`` seconds for a
    grammar is refused. Results are remembered, refusals too.
    """

    def __init__(self, *, threads: int = 2, deadline: float = DEADLINE_SECONDS) -> None:
        self._deadline = deadline
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._known: OrderedDict[bytes, Future[Any]] = OrderedDict()
        self._pending = 0
        self._lock = Lock()

    async def compile(self, grammar: str, field: str) -> str:
        """``grammar`` (Lark, or llguidance's JSON) itself, once llguidance has accepted it.

        Raises ``InvalidArgument`` naming ``field``, or ``ResourceExhausted`` while all threads are taken.
        """
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidArgument.at(
                field, f"{field}: the grammar has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARACTERS} are read"
            )
        checked: str = await self._once(("grammar", field, grammar), field, partial(_accepted, grammar, field))
        return checked

    async def schema(self, schema: Any, field: str, *, openapi: bool) -> str:
        """The grammar of the JSON values that match a caller's schema. Raises as `compile` does."""
        check_size(schema, field)
        convert = openapi_schema if openapi else json_schema
        key = (convert.__name__, field, json.dumps(schema))
        grammar: str = await self._once(key, field, partial(_enforced, convert, schema, field))
        return grammar

    async def choice(self, schema: Any, field: str, *, openapi: bool) -> str:
        """The grammar of the bare texts that a caller's schema lists in its ``enum``. Raises as `compile` does."""
        check_size(schema, field)
        convert = openapi_schema if openapi else json_schema
        key = ("choice", convert.__name__, field, json.dumps(schema))
        grammar: str = await self._once(key, field, partial(_chosen, convert, schema, field))
        return grammar

    async def relaxed(self, schema: Any) -> Schema:
        """A function's parameters as a schema that compiles, as close to the caller's as can be; never refuses."""
        field = "parameters"
        try:
            check_size(schema, field)
            key = ("relaxed", field, json.dumps(schema))
            found: Schema = await self._once(key, field, partial(_repaired, schema))
        except (InvalidArgument, ResourceExhausted):
            return {"type": "object"}
        return found

    def close(self) -> None:
        """Let the threads end; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _once(self, key: tuple[str, ...], field: str, job: Job) -> Any:
        """The job's result: remembered, shared with whoever waits for it already, or made now."""
        future = self._future(sha256(json.dumps(key).encode()).digest(), job)
        await asyncio.wait([asyncio.wrap_future(future)], timeout=self._deadline)
        if future.cancel() or future.cancelled():
            raise ResourceExhausted(_BUSY)
        if not future.done():
            raise InvalidArgument.at(
                field, f"{field}: compiling it takes more than {self._deadline:g} seconds; send a simpler one"
            )
        outcome = future.result()
        if isinstance(outcome, InvalidArgument):
            raise InvalidArgument(outcome.message, outcome.violations)
        return outcome

    def _future(self, key: bytes, job: Job) -> Future[Any]:
        known = self._known.get(key)
        if known is not None and not known.cancelled():
            self._known.move_to_end(key)
            return known
        if self._pending >= MAX_WAITING:
            raise ResourceExhausted(_BUSY)
        self._count(1)
        future = self._known[key] = self._pool.submit(_outcome, job)
        future.add_done_callback(lambda _: self._count(-1))
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return future

    def _count(self, change: int) -> None:
        with self._lock:
            self._pending += change


async def answer_grammar(config: GenerationConfig, compiler: GrammarCompiler) -> str | None:
    """The grammar that the answer's text must follow, None where it is free. Raises as `GrammarCompiler.compile`."""
    form = answer_form(config)
    if form is None:
        return None
    if form.mime_type == ENUM:
        return await compiler.choice(form.schema, form.field, openapi=form.openapi)
    return await compiler.schema(form.schema, form.field, openapi=form.openapi)


# What follows runs in the pool.


def _outcome(job: Job) -> Any:
    """A refusal is a result too, and remembered like one."""
    try:
        return job()
    except InvalidArgument as refusal:
        return refusal


def _enforced(convert: Conversion, schema: Any, field: str) -> str:
    document = convert(schema, field)
    problem = schema_problem(document)
    if problem:
        raise _unenforceable(field + culprit(document)[0], problem)
    return json_grammar(document)


def _chosen(convert: Conversion, schema: Any, field: str) -> str:
    texts = convert(schema, field).get("enum", [])
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InvalidArgument.at(
            field, f"{field}: {ENUM} needs a schema of type STRING with an enum of texts that are not empty"
        )
    return _accepted(choice_grammar(texts), field)


def _accepted(grammar: str, field: str) -> str:
    problem = grammar_problem(grammar)
    if problem:
        raise _unenforceable(field, problem)
    return grammar


def _repaired(schema: Any) -> Schema:
    """Weaken what llguidance cannot take, one place after the other."""
    document = relaxed_schema(schema)
    for _ in range(MAX_REPAIRS):
        if not schema_problem(document):
            return document
        _, wrong = culprit(document)
        if wrong is document:
            break
        _weaken(wrong)
    return {"type": "object"}


def _weaken(schema: Schema) -> None:
    """Keep the type alone, then nothing."""
    kind = schema.get("type")
    keep = {"type": kind} if kind is not None and len(schema) > 1 else {}
    schema.clear()
    schema.update(keep)


def _unenforceable(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument.at(field, f"{field}: this cannot be enforced: {problem}")
