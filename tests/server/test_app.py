"""The application as a whole: routes under both prefixes, layers in their order, errors in one envelope."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.fakes import failing, serving, tokenizer_folder

from engine.api.events import Delta, ErrorKind

BODY = {"contents": [{"parts": [{"text": "hi"}]}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path)


@pytest.mark.parametrize("prefix", ["", "/genai"])
async def test_the_api_answers_under_both_prefixes(folder: Path, prefix: str) -> None:
    async with serving(folder) as server:
        models = await server.client.get(f"{prefix}/v1beta/models")
        unknown = await server.client.get(f"{prefix}/nothing/here")
    assert [model["name"] for model in models.json()["models"]] == ["models/tiny"]
    assert (unknown.status_code, unknown.json()["error"]["status"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/models"), ("GET", "/v1/models/tiny:countTokens")])
async def test_a_wrong_http_method_is_405_in_the_envelope(folder: Path, method: str, path: str) -> None:
    async with serving(folder) as server:
        answer = await server.client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, 405)


async def test_no_redirect_is_built_from_a_host_header(folder: Path) -> None:
    async with serving(folder) as server:
        assert (await server.client.get("/healthz/")).status_code == 200
        assert (await server.client.get("/genai")).status_code == 404


async def test_one_log_line_per_request_with_its_tokens(folder: Path) -> None:
    async with serving(folder) as server:
        with capture_logs() as lines:
            await server.generate(BODY | {"labels": {"team": "x"}}, model="gemini-2.5-flash")
            await server.stream(BODY)
            await server.generate({"contents": []}, model="unheard-of")
    good, streamed, unknown = [line for line in lines if line["event"] == "request"]
    assert (good["model"], good["method"], good["status"]) == ("tiny", "generateContent", 200)
    assert good["generated_tokens"] == 2
    assert good["ignored"] == ["labels"]
    assert streamed["method"] == "streamGenerateContent"
    assert (unknown["status"], unknown["error"]) == (404, "NOT_FOUND")
    assert "model" not in unknown
    assert "hi" not in {str(value) for line in lines for value in line.values()}


async def test_a_stream_that_fails_is_counted_with_the_failure(folder: Path) -> None:
    async with serving(folder) as server:
        server.engine.answers.append(failing(ErrorKind.UNAVAILABLE, "it died", Delta(0, (1,), "a")))
        answer = await server.stream(BODY)
        metrics = (await server.client.get("/metrics")).text
    assert answer.status_code == 200
    assert 'castor_requests_total{code="503",method="streamGenerateContent",model="tiny"} 1.0' in metrics


async def test_keys_guard_the_api_and_salt_the_prefix_cache(folder: Path) -> None:
    async with serving(folder, api_keys=("one", "two")) as server:
        assert (await server.generate(BODY)).status_code == 403
        for key in ("one", "two", "one"):
            assert (await server.generate(BODY, headers={"x-goog-api-key": key})).status_code == 200
        assert (await server.client.get("/healthz")).status_code == 200
        assert (await server.client.get("/metrics")).status_code == 403
        scrape = await server.client.get("/metrics", headers={"authorization": "Bearer one"})
    first, second, again = (request.salt for request in server.engine.requests)
    assert first == again != second
    assert 'castor_rejected_total{reason="api_key"} 2.0' in scrape.text


async def test_without_keys_there_is_one_identity_and_foreign_pages_are_refused(folder: Path) -> None:
    async with serving(folder) as server:
        assert (await server.generate(BODY)).status_code == 200
        assert (await server.generate(BODY, headers={"host": "evil.org"})).status_code == 403
        assert (await server.generate(BODY, headers={"origin": "https://evil.org"})).status_code == 403
    assert [request.salt for request in server.engine.requests] == [""]


async def test_an_allowed_origin_gets_its_preflight_without_a_key(folder: Path) -> None:
    preflight = {"origin": "https://app.org", "access-control-request-method": "POST"}
    async with serving(folder, api_keys=("one",), cors_origins=("https://app.org",)) as server:
        answer = await server.client.options("/v1beta/models/tiny:generateContent", headers=preflight)
        refused = await server.generate(BODY, headers={"origin": "https://app.org"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.org")
    assert refused.status_code == 403
    assert refused.headers["access-control-allow-origin"] == "https://app.org", "so that the page can read the error"


async def test_a_bug_is_a_500_with_an_id_and_nothing_else(folder: Path) -> None:
    async with serving(folder) as server:
        server.engine.refusal = ZeroDivisionError("internal secret")  # type: ignore[assignment]
        with capture_logs() as lines:
            answer = await server.generate(BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["status"] == "INTERNAL"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in {line.get("request") for line in lines if "exc_info" in line}


def test_the_server_does_without_torch(folder: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
import server.app, server.http.serving, server.commands.serve, server.commands.models
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.rendering import TemplateInput
tokenizer = ChatTokenizer(Path({str(folder)!r}))
assert asyncio.run(tokenizer.render(TemplateInput([{{"role": "user", "content": "hi"}}])))
assert "torch" not in sys.modules, "torch came in"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
