"""An engine process as its parent sees it: start, messages, end, clean-up, and when to start again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from engine.api.engine import EngineConfig
from engine.process.messages import EXIT_FAILED, EXIT_REFUSED, FromWorker, Stop, ToWorker, pack, unpack_from_worker
from engine.process.output import relayed

# -P keeps Python from importing a folder in the working directory that happens to be named "engine".
COMMAND = (sys.executable, "-P", "-m", "engine.process.worker")

_DRAIN_SECONDS = 0.2
_LAST_WORDS_SECONDS = 2.0  # on a busy machine they may reach the socket's thread late
_KILL_SECONDS = 10.0  # a killed process is gone once the kernel has reclaimed its memory
_BURST = 16  # messages
_SOCKET = "engine"
_LONGEST_ADDRESS = 103 if sys.platform == "darwin" else 107  # bytes of a path in sun_path (unix(7)), without its end
_STABLE_SECONDS = 60.0
_LONGEST_DELAY = 30.0
_STARTS_BEFORE_GIVING_UP = 3

_log = logging.getLogger("castor.engine")


class WorkerProcess:
    """One running engine process and the socket to it. Made by ``worker_process``, which also cleans up."""

    def __init__(self, process: Process, socket: zmq.asyncio.Socket, folder: str) -> None:
        self.ended_because = ""
        self.hopeless = False  # ended for a reason that a restart would meet again
        self._process = process
        self._socket = socket
        self._folder = folder
        self._exited = asyncio.create_task(process.wait())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.returncode

    def send(self, message: ToWorker) -> None:
        """Send at once, in order. What is sent to a process that has just died is lost; ``messages`` ends then."""
        with contextlib.suppress(zmq.ZMQError):
            asyncio.ensure_future(self._socket.send(pack(message), zmq.NOBLOCK)).result()

    async def messages(self) -> AsyncIterator[FromWorker]:
        """All messages of the process, to the last one; ends when the process has ended.

        Those that have come already follow each other at once: readers that cannot keep up get their events together.
        """
        number = 0
        while (data := await self._receive()) is not None:
            number += 1
            if number % _BURST == 0:
                await asyncio.sleep(0)  # however quick the process is, others get their turns
            if self._folder:
                # Once the process has connected, the address is not needed: removed now, nothing is left behind even
                # if both sides are killed.
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = ""
            try:
                yield unpack_from_worker(data)
            except msgspec.MsgspecError as error:
                self.kill(f"sent a message that cannot be read ({error})")

    async def _receive(self) -> bytes | None:
        arrival = asyncio.ensure_future(self._socket.recv())
        if not arrival.done():
            await asyncio.wait({arrival, self._exited}, return_when=asyncio.FIRST_COMPLETED)
        if not arrival.done():
            # A process that ends with these codes has sent its reason, which may not have arrived yet.
            promised = self.exit_code in (EXIT_FAILED, EXIT_REFUSED) and not self.ended_because
            await asyncio.wait({arrival}, timeout=_LAST_WORDS_SECONDS if promised else _DRAIN_SECONDS)
        if arrival.done():
            data: bytes = arrival.result()
            return data
        arrival.cancel()
        return None

    def kill(self, because: str) -> None:
        """End the process now; ``because`` completes the sentence "The engine process …"."""
        self.ended_because = self.ended_because or because
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, patience: float) -> None:
        """Ask the process to stop; kill it if it still runs after ``patience`` seconds."""
        self.send(Stop())
        if not await self.gone(patience):
            self.kill("did not stop when asked to")

    async def gone(self, patience: float) -> bool:
        """Wait for the end of the process; False if it takes longer than ``patience`` seconds."""
        await asyncio.wait({self._exited}, timeout=patience)
        return self._exited.done()

    def death(self) -> str:
        """Why the process ended, to complete the sentence "The engine process …"."""
        if self.ended_because:
            return self.ended_because
        if self.exit_code is None:
            return "is not supervised any more"
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            hint = " (often: out of memory)" if name == "SIGKILL" else ""
            return f"was ended by {name}{hint}"
        return f"ended with exit code {self.exit_code}"


def socket_folder() -> str:
    """A new folder for the socket, for this user alone: in the folder for temporary files, or in /tmp where the address
    would be longer than the system allows."""
    folder = tempfile.mkdtemp(prefix="castor-")
    if len(os.fsencode(f"{folder}/{_SOCKET}")) <= _LONGEST_ADDRESS:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="castor-", dir="/tmp")


@asynccontextmanager
async def worker_process(config: EngineConfig, command: tuple[str, ...]) -> AsyncIterator[WorkerProcess]:
    """Start a process for the duration of the context. Afterwards process, socket, pipe and folder are gone.

    Raises OSError if the process cannot be started.
    """
    async with AsyncExitStack() as stack:
        folder = socket_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        address = f"ipc://{folder}/{_SOCKET}"
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)  # no limit on its queues: the requests in flight bound how much can be queued
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{address}: {error.strerror}") from error
        output = await stack.enter_async_context(relayed())
        lifeline_end, lifeline = os.pipe()
        stack.callback(os.close, lifeline)
        # Both sides must run the same code, so the process gets the import path of this one.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # What libraries print is logged when it is printed, and not when a buffer is full.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        try:
            os.write(lifeline, msgspec.json.encode(config) + b"\n")
            process = await asyncio.create_subprocess_exec(
                *command, address, stdin=lifeline_end, stdout=output, stderr=output, env=environment
            )
        finally:
            os.close(lifeline_end)
            os.close(output)
        worker = WorkerProcess(process, socket, folder)
        try:
            yield worker
        finally:
            worker.kill("was no longer wanted")
            if not await worker.gone(_KILL_SECONDS):
                _log.error("The killed engine process %d did not exit after SIGKILL", worker.pid)


class RestartPolicy:
    """When to restart a process that has died: at once, then with growing delays; never if it was never ready.

    ``deaths`` counts those since it last was ready for a while.
    """

    def __init__(self) -> None:
        self.deaths = 0
        self._was_ready = False

    def died(self, ready_seconds: float | None) -> float | None:
        """Seconds to wait before the next start, or None to give up; ``ready_seconds`` is None if it never was."""
        if ready_seconds is not None:
            self._was_ready = True
            if ready_seconds >= _STABLE_SECONDS:
                self.deaths = 0
        self.deaths += 1
        if not self._was_ready and self.deaths >= _STARTS_BEFORE_GIVING_UP:
            return None
        return 0.0 if self.deaths == 1 else min(_LONGEST_DELAY, 2.0 ** (self.deaths - 2))
