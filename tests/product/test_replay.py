"""Requests that real clients sent, replayed against the real server: each is answered, or refused as documented."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.server import RunningServer, running_server

DATA = Path(__file__).parents[1] / "data"
RECORDED = [json.loads(line) for line in (DATA / "recorded_requests.jsonl").read_text().splitlines()]
REFUSED = {row["case"]: row for row in yaml.safe_load((DATA / "refused_requests.yaml").read_text())}
RECORDED_MODELS = ("m1", "fc", "jsonout", "s-think", "e1")
LENIENT = ["generationConfig.thinkingConfig.thinkingBudget", "generationConfig.thinkingConfig.thinkingLevel"]
"""As in the entry of the built-in model, which cannot think."""

pytestmark = pytest.mark.product


def case_name(index: int) -> str:
    """The row's place and case: cases repeat, one per request of a conversation."""
    return f"{index:02d} {RECORDED[index]['case']}"


@pytest.fixture(scope="module")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("replay")
    entry = {
        "source": str(builtin_model),
        "aliases": list(RECORDED_MODELS),
        "max_output_tokens": 24,
        "lenient": LENIENT,
    }
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {"recorded": entry}}))
    with running_server(folder, "--models", str(folder / "models.yaml")) as server:
        yield server


def body_bytes(body: Any) -> bytes:
    """The body as it was sent; one that was recorded as a prefix is rebuilt at its recorded length."""
    if body is None:
        return b""
    if "__raw_len" in body:
        prefix = base64.b64decode(body["__raw_b64_prefix"])
        return prefix + prefix[-1:] * (body["__raw_len"] - len(prefix))
    return json.dumps(body).encode()


def replayed_headers(row: dict[str, Any]) -> dict[str, str]:
    dropped = {"content-length", "connection", "accept-encoding"}
    return {name: value for name, value in row["headers"].items() if name.lower() not in dropped}


def upload_command(row: dict[str, Any]) -> str:
    return str({name.lower(): value for name, value in row["headers"].items()}.get("x-goog-upload-command", ""))


def replayed(castor: RunningServer, index: int) -> httpx.Response:
    """The answer to a recorded row. The steps of an upload follow each other, at the address that its start told; files
    that recorded rows speak of are there, and names that they choose are free."""
    first = index
    while upload_command(RECORDED[first]) not in ("", "start"):
        first -= 1
    castor.client.delete("/v1beta/files/myname")
    form = {"metadata": (None, '{"name": "files/abc123"}'), "file": ("known.txt", b"Castor is a beaver.")}
    assert castor.client.post("/upload/v1beta/files", files=form).status_code in (200, 409)
    url = ""
    for row in RECORDED[first : index + 1]:
        if upload_command(row) == "start":
            url = ""
        answer = castor.client.request(
            row["method"], url or row["path"], content=body_bytes(row["body"]), headers=replayed_headers(row)
        )
        url = answer.headers.get("x-goog-upload-url", url)
    return answer


@pytest.mark.parametrize("index", range(len(RECORDED)), ids=case_name)
def test_a_recorded_request_is_answered_or_refused_as_documented(index: int, castor: RunningServer) -> None:
    answer = replayed(castor, index)
    refusal = REFUSED.get(case_name(index))
    if refusal is None:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == refusal["status"], answer.text
    error = answer.json()["error"]
    assert error["code"] == refusal["status"]
    assert refusal["message"] in error["message"]


def test_every_refusal_in_the_table_is_a_recorded_case() -> None:
    assert set(REFUSED) <= {case_name(index) for index in range(len(RECORDED))}
    assert all(row["brought_by"] for row in REFUSED.values())
