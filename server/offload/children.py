"""Child processes for work that cannot be interrupted or trusted to stay small: each does one job and can be killed.

A job is a function of a module and its arguments. It crosses as a pickle, which the child may trust; its result comes
back as msgpack, which cannot harm this process even if the child is compromised. Each message is preceded by its
length.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from engine.api.machine import total_bytes
from server.errors import FieldViolation, InvalidArgument
from server.offload.child import EXIT_MEMORY, FAILURE, LENGTH, READY, REFUSAL
from server.offload.fair import FairSlots

START_SECONDS = 60.0
"""The time limit for importing libraries, on a busy machine."""
IDLE_SECONDS = 60.0
"""A child without work for this long ends, which frees its memory."""

_OUT_OF_MEMORY = (EXIT_MEMORY, -signal.SIGABRT, -signal.SIGSEGV)
"""How a child ends that gets no more memory: by Python, by Rust's allocator, by a stack overflow."""


def share_of_memory(most: int) -> int:
    """``most`` bytes for a child, but no more than half of what this machine or container has."""
    return min(most, total_bytes() // 2)


class TookTooLong(Exception):
    """A job used up its time, and its child was killed."""


class TookTooMuch(Exception):
    """A job needs more memory than its child may have."""


class JobFailed(Exception):
    """The job raised an unexpected exception; the message is for the log."""


class ChildDied(Exception):
    """The child ended for another reason, which says nothing about the job."""


class ChildProcesses:
    """At most ``number`` processes, started when they are needed, each of at most ``memory`` bytes of address space.

    Callers take turns by owner (`fair.py`); where too many wait, or one too long, they are refused with the message
    ``busy``. A new process runs ``prepare`` first, such as importing what its jobs need.
    """

    def __init__(self, number: int, memory: int, busy: str, prepare: Callable[[], None] | None = None) -> None:
        self._command = (sys.executable, "-P", "-m", "server.offload.child", str(memory))
        self._prepare = prepare
        self._slots = FairSlots(number, busy)
        self._idle: list[_Child] = []
        self._closed = False

    async def run(
        self, work: Callable[..., Any], *arguments: Any, owner: str, seconds: float, patience: float | None
    ) -> Any:
        """The result of ``work``, which may take ``seconds``; waits at most ``patience`` seconds for a free child.

        Raises ``ResourceExhausted``, the job's own ``InvalidArgument``, ``TookTooLong``, ``TookTooMuch``, ``JobFailed``
        and ``ChildDied``. Cancelling kills the job's child.
        """
        async with self._slots.of(owner, patience):
            child = None
            while self._idle and (child is None or not child.is_running):  # the system may have ended some meanwhile
                child = self._idle.pop()
            if child is None or not child.is_running:
                child = await _start(self._command)
            try:
                if self._prepare is not None and not child.is_prepared:
                    await child.do(self._prepare, (), START_SECONDS)
                    child.is_prepared = True
                return await child.do(work, arguments, seconds)
            finally:
                if child.is_free and not self._closed:
                    self._idle.append(child)
                    child.retiring = asyncio.create_task(self._retire(child))
                else:
                    await child.kill()

    async def close(self) -> None:
        """End the processes that have no job, and wait for them; one that has a job ends after it."""
        self._closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*(child.kill() for child in idle))

    async def _retire(self, child: _Child) -> None:
        """End an idle child after ``IDLE_SECONDS``."""
        await asyncio.sleep(IDLE_SECONDS)
        if child in self._idle:
            self._idle.remove(child)
        await child.kill()


class _Child:
    """One process: ``is_free`` between jobs that it has survived, while ``retiring`` waits to end it."""

    is_prepared = False

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.is_free = True
        self._process = process
        self._jobs = process.stdin
        self._answers = process.stdout
        self.retiring: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def do(self, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
        """Raises as `ChildProcesses.run` does."""
        if self.retiring is not None:
            self.retiring.cancel()
        self.is_free = False
        data = pickle.dumps((seconds, work, arguments), protocol=5)
        try:
            async with asyncio.timeout(seconds):
                self._jobs.write(LENGTH.pack(len(data)) + data)
                await self._jobs.drain()
                kind, content = await self._answer()
        except TimeoutError:
            raise TookTooLong from None
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await self._process.wait()
            if status in _OUT_OF_MEMORY:
                raise TookTooMuch from None
            if status == -signal.SIGXCPU:
                raise TookTooLong from None
            raise ChildDied(f"a helper process ended with status {status}") from None
        self.is_free = True
        if kind == REFUSAL:
            message, violations = content
            raise InvalidArgument(message, [FieldViolation(*violation) for violation in violations])
        if kind == FAILURE:
            raise JobFailed(content)
        return content

    async def ready(self) -> None:
        """Wait until it can work. Raises ``ChildDied``."""
        try:
            async with asyncio.timeout(START_SECONDS):
                kind, _ = await self._answer()
        except (TimeoutError, asyncio.IncompleteReadError):
            kind = b""
        if kind != READY:
            await self.kill()
            raise ChildDied(f"a helper process did not start (exit status {self._process.returncode})")

    async def kill(self) -> None:
        """End it at once."""
        if self.retiring is not None and self.retiring is not asyncio.current_task():
            self.retiring.cancel()
        if self.is_running:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def _answer(self) -> tuple[bytes, Any]:
        head = await self._answers.readexactly(1 + LENGTH.size)
        body = await self._answers.readexactly(LENGTH.unpack(head[1:])[0])
        return head[:1], msgspec.msgpack.decode(body)


async def _start(command: tuple[str, ...]) -> _Child:
    """A process that is ready. It has this one's import path, but none of its keys. Raises ``ChildDied``."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    # One thread each: helpers must not compete with the engine.
    environment = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, cwd="/", start_new_session=True
    )
    child = _Child(process)
    try:
        await child.ready()
    except asyncio.CancelledError:
        await child.kill()
        raise
    return child
