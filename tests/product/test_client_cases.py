"""What users of other clients reported to public trackers, as requests with the answers that they should have got."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.server import RunningServer, running_server

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "client_cases.json").read_text(encoding="utf-8")
)
"""``server`` is what the server is started with, ``source`` the reports. ``expect``: ``status`` is one of these,
``has`` and ``lacks`` are about the JSON of the body, ``ignored`` must be named in x-castor-ignored."""
GENERATE = "/v1beta/models/gemini-2.5-flash:generateContent"
ENVIRONMENTS = {"keyed": {"CASTOR_API_KEYS": "good"}, "browser": {"CASTOR_CORS_ORIGINS": "https://chat.example"}}

pytestmark = pytest.mark.product


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server as the case wants it. Where none of its cases asks for an answer, its model is not loaded."""
    if request.param == "plain":
        yield request.getfixturevalue("castor")
        return
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "none").mkdir()
    entry = {"source": str(folder / "none"), "load": "request", "aliases": ["gemini-*"]}
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {"idle": entry}}))
    environment = ENVIRONMENTS[request.param]
    with running_server(folder, "--models", str(folder / "models.yaml"), environment=environment) as running:
        yield running


def found(document: Any, path: str) -> bool:
    """Whether the JSON has something at these keys and indices."""
    for step in path.split("."):
        if isinstance(document, list) and step.isdigit() and int(step) < len(document):
            document = document[int(step)]
        elif isinstance(document, dict) and step in document:
            document = document[step]
        else:
            return False
    return True


def problems(answer: httpx.Response, expect: dict[str, Any]) -> list[str]:
    """Every way in which an answer is other than expected."""
    document = answer.json() if "application/json" in answer.headers.get("content-type", "") else None
    ignored = answer.headers.get("x-castor-ignored", "")
    checks = {
        f"status {answer.status_code}": answer.status_code in expect["status"],
        f"content type {answer.headers.get('content-type')}": expect.get("content_type", "")
        in answer.headers.get("content-type", ""),
        f"does not begin with {expect.get('begins')}": answer.text.startswith(expect.get("begins", "")),
        f"lacks {expect.get('contains')}": expect.get("contains", "") in answer.text,
    }
    checks |= {f"no header {name}": name in answer.headers for name in expect.get("has_headers", [])}
    checks |= {
        f"header {name}: {answer.headers.get(name)}": answer.headers.get(name) == value
        for name, value in expect.get("headers_are", {}).items()
    }
    checks |= {f"no {path}": found(document, path) for path in expect.get("has", [])}
    checks |= {f"has {word}": f'"{word}"' not in answer.text for word in expect.get("lacks", [])}
    checks |= {f"{word} is not named in {ignored!r}": word in ignored for word in expect.get("ignored", [])}
    return [problem for problem, holds in checks.items() if not holds]


@pytest.mark.parametrize(
    ("server", "case"),
    [pytest.param(case["server"], case, id=case["case"]) for case in CASES],
    indirect=["server"],
)
def test_a_case(case: dict[str, Any], server: RunningServer) -> None:
    body = case.get("body")
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode() if body is not None else None
    headers = {"content-type": "application/json", **case.get("headers", {})}
    answer = server.client.request(case["method"], case["path"], content=content, headers=headers)
    assert problems(answer, case["expect"]) == [], answer.text


def asked(text: str = "Say hi.", tokens: int = 4) -> bytes:
    config = {"maxOutputTokens": tokens, "temperature": 0}
    return json.dumps({"contents": [{"parts": [{"text": text}]}], "generationConfig": config}).encode()


def spoken(server: RunningServer, head: str, payload: bytes) -> bytes:
    """All bytes of the answer to a request with this head, on a connection that ends after it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + payload)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent?alt=sse"])
def test_an_offer_of_http_2_is_ignored(method: str, chunked: bool, castor: RunningServer) -> None:
    """Kludex/uvicorn#2722, vllm-project/vllm#57203, langchain4j/langchain4j#3682 and #3883, Soju06/codex-lb#1757."""
    body = asked()
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    payload = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = (
        f"POST /v1beta/models/gemini-2.5-flash:{method} HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"
        f"Connection: Upgrade, HTTP2-Settings, close\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\n"
        f"{framing}\n\n"
    )
    answer = spoken(castor, head, payload)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"candidates" in answer


@pytest.mark.parametrize("method", ["streamGenerateContent?alt=sse", "streamGenerateContent", "generateContent"])
def test_http_1_0_gets_a_body_that_ends_with_the_connection(method: str, castor: RunningServer) -> None:
    """Kludex/uvicorn PR#1360: old proxies and devices show the sizes of chunks as text."""
    body = asked()
    head = f"POST /v1beta/models/gemini-2.5-flash:{method} HTTP/1.0\nHost: 127.0.0.1\nContent-Length: {len(body)}\n\n"
    head, _, rest = spoken(castor, head, body).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    assert rest[:1] in (b"{", b"[") or rest.startswith(b"data: {")


def test_a_packed_body_is_read(castor: RunningServer) -> None:
    """Gateways and mobile SDKs pack what they send."""
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert castor.client.post(GENERATE, content=gzip.compress(asked()), headers=headers).status_code == 200
    broken = castor.client.post(GENERATE, content=b"\x1f\x8b nonsense", headers=headers)
    assert broken.status_code == 400
    assert broken.json()["error"]["status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("name", ["owui-v1-61ed4729e1359829", "123-456", "a--b", f"{'a-' * 19}ab"])
def test_a_file_keeps_its_name_with_dashes(name: str, castor: RunningServer) -> None:
    """QuantumNous/new-api#2078 and #1474: Open WebUI names its uploads itself; Google allows 40 characters."""
    client, path, data = castor.client, f"/v1beta/files/{name}", b"The dog is called Rufus."
    assert client.get(path).status_code == 403
    start = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    described = {"file": {"name": f"files/{name}", "mimeType": "text/plain"}}
    begun = client.post("/upload/v1beta/files", json=described, headers=start)
    assert begun.status_code == 200, begun.text
    send = {"X-Goog-Upload-Offset": "0", "X-Goog-Upload-Command": "upload, finalize"}
    uploaded = client.post(begun.headers["x-goog-upload-url"], content=data, headers=send)
    assert uploaded.json()["file"]["name"] == f"files/{name}"
    assert client.get(path).status_code == 200
    assert client.get(f"{path}:download?alt=media").content == data
    used = {"contents": [{"parts": [{"fileData": {"fileUri": f"{castor.url}{path}"}}, {"text": "Name?"}]}]}
    assert client.post("/v1beta/models/gemini-2.5-flash:countTokens", json=used).json()["totalTokens"] > 10
    assert client.delete(path).status_code == 200


@pytest.mark.parametrize("name", ["-a", "a-", "A-b", "a" * 41])
def test_a_file_gets_no_name_that_google_refuses(name: str, castor: RunningServer) -> None:
    start = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    refused = castor.client.post("/upload/v1beta/files", json={"file": {"name": f"files/{name}"}}, headers=start)
    assert refused.status_code == 400


def test_calls_have_ids_that_are_accepted_back(castor: RunningServer) -> None:
    """CopilotKit/aimock PR#19, jeremychone/rust-genai PR#232, MoonshotAI/kimi-cli PR#1582."""
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    declared = [
        {"functionDeclarations": [{"name": "weather", "parameters": city}, {"name": "time", "parameters": city}]}
    ]

    def ask(contents: list[Any], mode: str) -> dict[str, Any]:
        config = {"maxOutputTokens": 120, "temperature": 0}
        calling = {"functionCallingConfig": {"mode": mode}}
        body = {"contents": contents, "tools": declared, "toolConfig": calling, "generationConfig": config}
        answer = castor.client.post(GENERATE, json=body)
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()["candidates"][0]["content"]
        return content

    question = {"role": "user", "parts": [{"text": "Weather in Oslo and Rome?"}]}
    turn = ask([question], "ANY")
    calls = [part["functionCall"] for part in turn["parts"]]
    ids = [call["id"] for call in calls]
    assert all(ids)
    assert len(set(ids)) == len(ids) >= 1
    results = [
        {"functionResponse": {"id": call["id"], "name": call["name"], "response": {"temp": 4}}} for call in calls
    ]
    assert ask([question, turn, {"role": "user", "parts": results}], "NONE")["parts"]
