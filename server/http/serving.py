"""The life of a server process: bind, load, announce, serve, drain, end."""

from __future__ import annotations

import asyncio
import errno
import faulthandler
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.applications import Starlette

from server.config.errors import ConfigError
from server.config.settings import Settings
from server.http.connection import BoundedHttp

KEEP_ALIVE_SECONDS = 30
CLOSING_SECONDS = 20
"""How long the engines may take to end after the drain; then tasks that are left are cancelled."""
LAST_SECONDS = 15
"""How long those may take; then the process ends, whatever it is doing."""


SWITCH_SECONDS = 0.001
"""How long a thread that reads a large request keeps the event loop waiting for the interpreter, where Python's default
is 5 ms: an answer to another client takes several such waits."""
GARBAGE_THRESHOLDS = (500_000, 50, 10)
"""Garbage collections stop everything, and requests leave nothing behind that only they can free
(`tests/server/test_garbage.py`). Many that come at once are all alive while a collection looks for garbage among them:
that took a tenth of the time of a burst."""


def settle() -> None:
    """Exclude what the process has loaded so far from all later garbage collections."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def bind(settings: Settings) -> socket.socket:
    """The listening socket of the server. Raises ``ConfigError`` where it cannot be bound."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except socket.gaierror:
        raise ConfigError(f"host {settings.host!r} is not an address or a name of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {settings.port} on {settings.host} is in use: end the other program or pass another --port"
        elif error.errno == errno.EACCES:
            problem = f"port {settings.port} needs more rights than this user has: pass a --port above 1023"
        else:
            problem = f"the server cannot listen on {where}: {error.strerror}"
        raise ConfigError(problem) from None


def uvicorn_config(app: Starlette, settings: Settings) -> uvicorn.Config:
    """uvicorn as this server runs it: our log, our limits, no websockets."""
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # server.http.middleware.forwarded reads them, and some more
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + CLOSING_SECONDS,
    )


class CastorServer(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, then drains: no new connections, ``drain_seconds`` for what is running, and then
    the engines are closed, which gives every request in flight its terminal error.

    ``announce`` runs beside the server once it accepts connections, ``begin_drain`` when it stops accepting them, and
    ``close_engines`` after the drain.
    """

    def __init__(
        self,
        app: Starlette,
        settings: Settings,
        announce: Callable[[CastorServer], Awaitable[None]],
        begin_drain: Callable[[], None],
        close_engines: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(uvicorn_config(app, settings))
        self.exit_code = 0
        self._drain_seconds = settings.drain_seconds
        self._announce = announce
        self._begin_drain = begin_drain
        self._close_engines = close_engines
        self._announcing: asyncio.Future[None] | None = None
        self._is_process = False

    def run(self, sockets: list[socket.socket] | None = None) -> NoReturn:
        """Serve, then end the process without waiting for threads that still compute."""
        self._is_process = True
        sys.setswitchinterval(SWITCH_SECONDS)
        asyncio.run(self._live(sockets))
        raise AssertionError("the process has ended")

    async def _live(self, sockets: list[socket.socket] | None) -> NoReturn:
        try:
            await self.serve(sockets)
        except BaseException as error:
            logging.getLogger("castor").error("the server failed", exc_info=error)
            self.exit_code = self.exit_code or 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.exit_code)

    def end(self, exit_code: int) -> None:
        """Start the shutdown, as a signal would."""
        self.exit_code = exit_code
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """The first signal begins the drain; a Ctrl-C after it ends at once (engines end with their parent)."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)
        if self._is_process and not self.should_exit:
            # A C thread: it also ends a process in which no Python code runs any more.
            faulthandler.dump_traceback_later(self._drain_seconds + CLOSING_SECONDS + LAST_SECONDS, exit=True)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announcing = asyncio.ensure_future(self._announce(self))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._begin_drain()
        if self._announcing is not None:
            self._announcing.cancel()
        closing = asyncio.create_task(self._close_after_drain())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_after_drain(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        await self._close_engines()
