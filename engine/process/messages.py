"""The messages between the front end and an engine process: msgpack, one tagged struct per message.

They carry the values of ``engine.api`` unchanged. Both sides run the same code, so there is no version field.
"""

from __future__ import annotations

import msgspec

from engine.api.engine import EngineStats, ModelInfo
from engine.api.events import RequestEvents
from engine.api.requests import Request

EXIT_FAILED = 1
EXIT_REFUSED = 3  # the model can never be served: do not start again (2 is the interpreter's own, for a bad command)


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a request.

    ``body`` is the packed ``Request``, decoded in a second step: if it cannot be read, the request can still be
    answered by its ``request_id``.
    """

    request_id: str
    body: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a request; it still gets its ``RequestFinished``."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process; requests in flight get no further events."""


ToWorker = Submit | Cancel | Stop


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far the model is loaded: the name of the stage and how much of it is done, from 0 to 1."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests can be submitted."""

    info: ModelInfo


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The model can never be served as it is; starting the process again would not help."""

    message: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last words of a process that ends with an unexpected error."""

    message: str


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """All events of one step of the engine, and its statistics after it."""

    events: list[RequestEvents]
    stats: EngineStats


FromWorker = Loading | Ready | Refused | Failed | StepEvents

pack = msgspec.msgpack.Encoder().encode
_requests = msgspec.msgpack.Decoder(Request)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def submit(request: Request) -> Submit:
    """Wrap a request. Raises ValueError or TypeError if msgpack cannot carry one of its values."""
    try:
        return Submit(request.id, msgspec.Raw(pack(request)))
    except OverflowError as error:
        raise ValueError(f"a number of the request does not fit into 64 bits: {error}") from error


def unpack_request(message: Submit) -> Request:
    """The request inside. Raises ``msgspec.MsgspecError`` naming the field and what is wrong with it."""
    return _requests.decode(message.body)


def unpack_to_worker(data: bytes) -> ToWorker:
    """A message for the engine process. Raises ``msgspec.MsgspecError``."""
    return _to_worker.decode(data)


def unpack_from_worker(data: bytes) -> FromWorker:
    """A message from the engine process. Raises ``msgspec.MsgspecError``."""
    return _from_worker.decode(data)
