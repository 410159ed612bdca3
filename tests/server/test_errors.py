"""Every failure as a client sees it."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from engine.api.errors import EngineUnavailable, Overloaded, RequestRefused
from engine.api.events import ErrorKind, RequestError
from server.errors import (
    ApiKeyInvalid,
    FieldViolation,
    InvalidArgument,
    ModelNotFound,
    as_api_error,
    error_json,
)


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (Overloaded(""), 429, "RESOURCE_EXHAUSTED"),
        (EngineUnavailable("loading"), 503, "UNAVAILABLE"),
        (RequestRefused("no"), 400, "INVALID_ARGUMENT"),
        (RuntimeError("secret"), 500, "INTERNAL"),
        (RequestError(ErrorKind.DEADLINE, "late"), 504, "DEADLINE_EXCEEDED"),
    ],
)
def test_the_mapping(failure: Any, code: int, status: str) -> None:
    error = as_api_error(failure)
    assert (error.code, error.status) == (code, status)
    assert error.message
    assert "secret" not in error_json(error)


def test_a_database_on_a_full_disk_is_told_as_such() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.OperationalError) as full:
        database.execute("CREATE TABLE a (b)")
    error = as_api_error(full.value)
    assert (error.code, "disk" in error.message) == (429, True)


def test_every_kind_of_the_engine_is_mapped() -> None:
    for kind in ErrorKind:
        assert as_api_error(RequestError(kind, "why")).message == "why"


def test_the_envelope() -> None:
    error = InvalidArgument.of([FieldViolation("a.b", "first"), FieldViolation("", "second")])
    assert json.loads(error_json(error)) == {
        "error": {
            "code": 400,
            "message": "first\nsecond",
            "status": "INVALID_ARGUMENT",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.BadRequest",
                    "fieldViolations": [{"field": "a.b", "description": "first"}, {"description": "second"}],
                }
            ],
        }
    }


def test_an_error_in_a_stream_starts_with_its_key() -> None:
    assert error_json(InvalidArgument("\u2028é")).startswith('{"error":{"code":400,')
    assert error_json(InvalidArgument("\u2028é")).isascii()


def test_a_bad_key_is_a_bad_request() -> None:
    error = ApiKeyInvalid()
    assert (error.code, error.details[0]["reason"]) == (400, "API_KEY_INVALID")


def test_an_unknown_model_is_named_in_full() -> None:
    assert ModelNotFound("x").message.startswith("models/x is not found")
    assert ModelNotFound("tunedModels/x").message.startswith("tunedModels/x is not found")
