"""Every failure that a client can see, and the one place that maps other failures to it.

::

    ApiError
    ├── InvalidArgument       400 INVALID_ARGUMENT    the request itself is wrong
    │   └── ApiKeyInvalid     400                     (Google answers a bad key with 400, not 401)
    ├── PermissionDenied      403 PERMISSION_DENIED   no key, wrong host or origin, no such file of the caller
    ├── NotFound              404 NOT_FOUND           no such path
    │   └── ModelNotFound     404                     no such model
    ├── MethodNotAllowed      405 UNIMPLEMENTED       a known path with another HTTP method
    ├── RequestTimeout        408 DEADLINE_EXCEEDED   the body stalled or took too long
    ├── AlreadyExists         409 ALREADY_EXISTS      the name is taken
    ├── Aborted               409 ABORTED             another request changes the same
    ├── PayloadTooLarge       413 INVALID_ARGUMENT    the body is over the limit
    ├── ResourceExhausted     429 RESOURCE_EXHAUSTED  the queue is full; carries RetryInfo
    ├── Cancelled             499 CANCELLED           the client hung up
    ├── Internal              500 INTERNAL            our fault
    ├── Unimplemented         501 UNIMPLEMENTED       a field or method that is not served
    ├── Unavailable           503 UNAVAILABLE         the engine is loading, died or is closing
    └── DeadlineExceeded      504 DEADLINE_EXCEEDED

Envelope and detail types: google.rpc.Status as JSON, ``{"error": {code, message, status, details}}``.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from engine.api.errors import EngineUnavailable, Overloaded, RequestRefused
from engine.api.events import ErrorKind, RequestError

RETRY_SECONDS = 2


class FieldViolation(NamedTuple):
    """One problem of a request; ``field`` is a snake_case path, "" for the request as a whole."""

    field: str
    description: str


class ApiError(Exception):
    """A failure in the words of the API. ``details`` are google.rpc detail objects with their ``@type``."""

    code: ClassVar[int] = 500
    status: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, details: Iterable[dict[str, Any]] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = list(details)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The envelope: ``code``, ``message`` and ``status`` always, ``details`` where there are any."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "status": self.status}
        if self.details:
            error["details"] = self.details
        return {"error": error}


class InvalidArgument(ApiError):
    """The request is wrong; each violation is named in ``details``."""

    code = 400
    status = "INVALID_ARGUMENT"

    def __init__(
        self, message: str, violations: Iterable[FieldViolation] = (), *, headers: Mapping[str, str] | None = None
    ) -> None:
        self.violations = tuple(violations)
        details = [bad_request(self.violations)] if self.violations else []
        super().__init__(message, details=details, headers=headers)

    @classmethod
    def of(cls, violations: Iterable[FieldViolation]) -> InvalidArgument:
        """Several problems in one error: their descriptions joined by newlines, as the real service does."""
        found = tuple(violations)
        return cls("\n".join(violation.description for violation in found), found)

    @classmethod
    def at(cls, field: str, description: str) -> InvalidArgument:
        """One problem at one field."""
        return cls.of([FieldViolation(field, description)])


class ApiKeyInvalid(InvalidArgument):
    """The key that came with the request is not one of this server's."""

    def __init__(self, message: str = "API key not valid. Please pass a valid API key.") -> None:
        super().__init__(message)
        self.details = [
            error_info("API_KEY_INVALID", service="generativelanguage.googleapis.com"),
            {"@type": _TYPE + "LocalizedMessage", "locale": "en-US", "message": message},
        ]


class PermissionDenied(ApiError):
    """The caller may not do this: no key was sent, the host or origin is not allowed, or no file of the caller has this
    name."""

    code = 403
    status = "PERMISSION_DENIED"


class NotFound(ApiError):
    """Nothing is at this path."""

    code = 404
    status = "NOT_FOUND"


class ModelNotFound(NotFound):
    """No model has this name, alias or pattern. ``name`` is the name without ``models/``."""

    def __init__(self, name: str, version: str = "v1beta", method: str = "generateContent") -> None:
        full = (name if "/" in name else f"models/{name}")[:200]
        super().__init__(
            f"{full} is not found for API version {version}, or is not supported for {method}. "
            "Call ListModels to see the list of available models and their supported methods."
        )


class MethodNotAllowed(ApiError):
    """The path exists for another HTTP method."""

    code = 405
    status = "UNIMPLEMENTED"


class RequestTimeout(ApiError):
    """The client stopped sending in the middle of its body, or sent it too slowly; its connection is closed."""

    code = 408
    status = "DEADLINE_EXCEEDED"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"Connection": "close"})


class AlreadyExists(ApiError):
    """The name that the client chose is taken."""

    code = 409
    status = "ALREADY_EXISTS"


class Aborted(ApiError):
    """Another request is changing the same thing; the client may try again."""

    code = 409
    status = "ABORTED"


class PayloadTooLarge(ApiError):
    """The body is longer than this server reads."""

    code = 413
    status = "INVALID_ARGUMENT"


class ResourceExhausted(ApiError):
    """The queue is full; RetryInfo and ``Retry-After`` say when to try again."""

    code = 429
    status = "RESOURCE_EXHAUSTED"

    def __init__(
        self, message: str, retry_seconds: int = RETRY_SECONDS, *, headers: Mapping[str, str] | None = None
    ) -> None:
        headers = {"Retry-After": str(retry_seconds), **(headers or {})}
        super().__init__(message, details=[retry_info(retry_seconds)], headers=headers)


class Cancelled(ApiError):
    """The client hung up before the answer; only logs and metrics see this."""

    code = 499
    status = "CANCELLED"


class Internal(ApiError):
    """The server itself failed; the message reveals no internals."""

    code = 500
    status = "INTERNAL"


class Unimplemented(ApiError):
    """A field or a method of the Gemini API that this server does not serve."""

    code = 501
    status = "UNIMPLEMENTED"

    def __init__(self, message: str, violations: Iterable[FieldViolation] = ()) -> None:
        found = tuple(violations)
        super().__init__(message, details=[bad_request(found)] if found else [])


class Unavailable(ApiError):
    """The engine cannot take the request now."""

    code = 503
    status = "UNAVAILABLE"

    def __init__(self, message: str, retry_seconds: int = RETRY_SECONDS) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_seconds)})


class DeadlineExceeded(ApiError):
    """The answer took longer than the client or the model's entry allows."""

    code = 504
    status = "DEADLINE_EXCEEDED"


_TYPE = "type.googleapis.com/google.rpc."


def bad_request(violations: Iterable[FieldViolation]) -> dict[str, Any]:
    """google.rpc.BadRequest; a violation of the request as a whole has no ``field``."""
    return {
        "@type": _TYPE + "BadRequest",
        "fieldViolations": [
            {"field": v.field, "description": v.description} if v.field else {"description": v.description}
            for v in violations
        ],
    }


def retry_info(seconds: int) -> dict[str, Any]:
    """google.rpc.RetryInfo."""
    return {"@type": _TYPE + "RetryInfo", "retryDelay": f"{seconds}s"}


def error_info(reason: str, **metadata: str) -> dict[str, Any]:
    """google.rpc.ErrorInfo of the domain that clients compare with."""
    return {"@type": _TYPE + "ErrorInfo", "reason": reason, "domain": "googleapis.com", "metadata": metadata}


_BY_KIND: dict[ErrorKind, type[ApiError]] = {
    ErrorKind.REFUSED: InvalidArgument,
    ErrorKind.OVERLOADED: ResourceExhausted,
    ErrorKind.CANCELLED: Cancelled,
    ErrorKind.DEADLINE: DeadlineExceeded,
    ErrorKind.UNAVAILABLE: Unavailable,
    ErrorKind.INTERNAL: Internal,
}


def as_api_error(failure: BaseException | RequestError) -> ApiError:
    """Any failure as a client sees it. Unknown ones become ``Internal``, without their text."""
    match failure:
        case ApiError():
            return failure
        case RequestError(kind=kind, message=message):
            return _BY_KIND[kind](message)
        case Overloaded():
            return ResourceExhausted(str(failure) or "The model is overloaded. Please try again later.")
        case EngineUnavailable():
            return Unavailable(str(failure) or "The model is not available now. Please try again later.")
        case RequestRefused():
            return InvalidArgument(str(failure))
        case (
            OSError(errno=errno.ENOSPC | errno.EDQUOT) | sqlite3.OperationalError(sqlite_errorcode=sqlite3.SQLITE_FULL)
        ):
            return ResourceExhausted("The disk of this server is full. Please try again later.", 60)
        case sqlite3.OperationalError():
            return Unavailable("The store of files cannot be used now. Please try again later.")
        case _:
            return Internal("An internal error has occurred. The server's log has the details.")


def error_json(error: ApiError) -> str:
    """The envelope on one line of ASCII with ``error`` as its first key."""
    return json.dumps(error.body(), separators=(",", ":"))
