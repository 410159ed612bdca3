"""The query of a call: masks, Google's standard parameters, those of a method, and all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.fakes import Harness, events_of, failing, serving, tokenizer_folder

from engine.api.events import Delta, ErrorKind

HI = {"contents": [{"parts": [{"text": "hi"}]}]}
RECORDED = Path(__file__).parents[2] / "data" / "recorded_requests.jsonl"
MODEL = "/v1beta/models/tiny"
RAW = {"X-Goog-Upload-Protocol": "raw", "content-type": "text/plain"}
START = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
LAST = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
OK = {"candidates": [{"content": {"parts": [{"text": "ok"}]}}]}


async def error(harness: Harness, method: str, path: str, **options: Any) -> dict[str, Any]:
    answer = await harness.client.request(method, path, **options)
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"params": {"fields": "candidates(content(parts(text)))"}},
        {"params": {"$fields": "candidates/content/parts/text"}},
        {"headers": {"x-goog-fieldmask": "candidates.content.parts.text"}},
        {"params": {"fields": "candidates/*/parts/text"}, "headers": {"x-goog-fieldmask": "candidates/*/parts/text"}},
    ],
)
async def test_a_mask_in_each_way_that_it_is_sent(harness: Harness, asked: dict[str, Any]) -> None:
    assert (await harness.generate(HI, **asked)).json() == OK


@pytest.mark.parametrize("alt", ["sse", ""])
async def test_a_mask_of_each_chunk_of_a_stream(harness: Harness, alt: str) -> None:
    answer = await harness.stream(
        HI, alt, headers={"x-goog-fieldmask": "candidates(content(parts(text)),finishReason)"}
    )
    assert answer.status_code == 200
    chunks = events_of(answer.text) if alt else answer.json()
    assert "".join(chunk["candidates"][0]["content"]["parts"][0]["text"] for chunk in chunks) == "ok"
    assert {name for chunk in chunks for name in chunk} == {"candidates"}
    assert {name for chunk in chunks for name in chunk["candidates"][0]} == {"content", "finishReason"}


@pytest.mark.parametrize("alt", ["sse", ""])
async def test_an_error_in_a_masked_stream_is_whole(harness: Harness, alt: str) -> None:
    harness.engine.answers.append(failing(ErrorKind.UNAVAILABLE, "it died", Delta(0, (1,), "a")))
    answer = await harness.stream(HI, alt, headers={"x-goog-fieldmask": "candidates/index"})
    assert "it died" in answer.text
    assert "usageMetadata" not in answer.text


async def test_masks_of_every_other_answer(harness: Harness) -> None:
    client = harness.client
    counted = await client.post(f"{MODEL}:countTokens?fields=totalTokens", json=HI)
    assert list(counted.json()) == ["totalTokens"]
    assert (await client.get(f"{MODEL}?fields=name,topK")).json()["name"] == "models/tiny"
    assert (await client.get("/v1/models?fields=models(name)")).json() == {"models": [{"name": "models/tiny"}]}
    made = await client.post("/upload/v1/files?fields=file(mime_type)", content=b"x", headers=RAW)
    assert made.json() == {"file": {"mimeType": "text/plain"}}
    (file,) = (await client.get("/v1/files?fields=files/name")).json()["files"]
    assert list(file) == ["name"]
    assert (await client.get(f"/v1/{file['name']}?fields=name")).json() == file
    assert (await client.delete(f"/v1/{file['name']}?fields=*")).json() == {}


async def test_the_mask_of_an_upload_is_for_its_last_answer(harness: Harness) -> None:
    started = await harness.client.post("/upload/v1/files?fields=file(name,uri)", json={}, headers=START)
    assert started.json() == {}
    url = started.headers["X-Goog-Upload-URL"]
    assert parse_qs(urlsplit(url).query)["fields"] == ["file(name,uri)"]
    assert set((await harness.client.post(url, content=b"x", headers=LAST)).json()["file"]) == {"name", "uri"}


async def test_a_mask_that_names_no_field_is_refused_before_any_work(harness: Harness) -> None:
    for path in (":generateContent", ":streamGenerateContent?alt=sse", ":countTokens"):
        refused = await error(harness, "POST", MODEL + path, json=HI, headers={"x-goog-fieldmask": "candidate"})
        assert "Cannot find matching fields for path 'candidate'" in refused["message"]
        assert refused["details"][0]["fieldViolations"][0]["field"] == "fields"
    assert harness.engine.requests == []


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("prettyPrint=true", "prettyPrint"),
        ("pp=1", "prettyPrint"),
        ("$prettyPrint=false", None),
        ("quotaUser=me", "quotaUser"),
        ("userIp=10.0.0.1&trace=x&$.xgafv=2", "userIp, trace, $.xgafv"),
        ("uploadType=media", "uploadType"),
        ("alt=json", None),
        ("$alt=json%3Benum-encoding%3Dint", "enum-encoding"),
        ("key=x&access_token=y&oauth_token=z", None),
        ("fields=", None),
    ],
)
async def test_standard_parameters_are_understood(harness: Harness, query: str, named: str | None) -> None:
    for method, path in (("GET", MODEL), ("GET", "/v1/models"), ("GET", "/v1/files"), ("POST", f"{MODEL}:countTokens")):
        answer = await harness.client.request(method, f"{path}?{query}", json=HI)
        assert (answer.status_code, answer.headers.get("x-castor-ignored")) == (200, named)
    generated = await harness.client.post(f"{MODEL}:generateContent?{query}", json=HI | {"labels": {}})
    assert (generated.status_code, generated.headers.get("x-castor-ignored")) == (200, named)


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", f"{MODEL}?foo=1", "Unknown name \"foo\": Cannot bind query parameter. Field 'foo' could not be found"),
        ("GET", f"{MODEL}?foo=", "getModel takes: alt, fields, key."),
        ("GET", f"{MODEL}?pageSize=1", "pageSize"),
        ("GET", "/v1/models?filter=x", "listModels takes: alt, fields, key, pageSize, pageToken."),
        ("POST", f"{MODEL}:generateContent?stream=true", "stream"),
        ("POST", f"{MODEL}:generateContent?Alt=sse", "Alt"),
        ("POST", f"{MODEL}:countTokens?alt=sse", "alt is 'sse', but countTokens answers with alt=json"),
        ("POST", f"{MODEL}:generateContent?alt=proto", "alt is 'proto'"),
        ("POST", f"{MODEL}:generateContent?alt=json&$alt=media", "alt must be given once"),
        ("POST", f"{MODEL}:generateContent?fields=candidates&fields=modelVersion", "fields must be given once"),
        ("POST", f"{MODEL}:generateContent?callback=f", "JSONP is not served"),
        ("POST", f"{MODEL}:generateContent?$callback=f", "JSONP is not served"),
        ("POST", f"{MODEL}:generateContent?prettyPrint=maybe", "prettyPrint is 'maybe'"),
        ("POST", f"{MODEL}:generateContent?upload_id=x", "upload_id"),
        ("GET", "/v1/files?pageSize=1&page_size=2", "pageSize must be given once"),
        ("GET", "/v1/files/x?alt=media", "getFile answers with alt=json"),
        ("GET", "/v1/files/x:download?alt=json", "downloadFile answers with alt=media"),
        ("GET", "/v1/files/x:download?fields=name", 'Unknown name "fields"'),
        ("POST", "/upload/v1/files?name=x", 'Unknown name "name"'),
    ],
)
async def test_what_a_method_does_not_take_is_refused_by_name(
    harness: Harness, method: str, path: str, words: str
) -> None:
    assert words in (await error(harness, method, path, json=HI))["message"]


async def test_a_refused_parameter_of_a_stream_comes_in_its_framing(harness: Harness) -> None:
    for query, is_list in (
        ("alt=proto", True),
        ("foo=1", True),
        ("alt=sse&foo=1", False),
        ("$alt=sse%3Benum-encoding%3Dint&foo=1", False),
    ):
        answer = await harness.client.post(f"{MODEL}:streamGenerateContent?{query}", json=HI)
        assert answer.status_code == 400
        assert isinstance(answer.json(), list) == is_list


async def test_a_whole_answer_comes_as_one_event_where_events_are_asked_for(harness: Harness) -> None:
    answer = await harness.client.post(f"{MODEL}:generateContent?alt=sse&fields=candidates/content/parts/text", json=HI)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events_of(answer.text) == [OK]


async def test_equal_values_count_once(harness: Harness) -> None:
    answer = await harness.client.post(f"{MODEL}:streamGenerateContent?alt=sse&$alt=sse", json=HI)
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_query_of_any_bytes_is_only_wrong(harness: Harness) -> None:
    for query in ("%FF=%FF", "=", "=x", "a" * 5000, "fields=%FF", "alt=%00", "pageSize=%00"):
        answer = await harness.client.get(f"/v1/models?{query}")
        assert answer.status_code == 400, query
        assert len(answer.text) < 3000


@pytest.mark.parametrize("name", ["key", "$key", "access_token", "oauth_token", "bearer_token"])
async def test_a_key_has_several_names(tmp_path: Path, name: str) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), api_keys=("good",)) as harness:
        for value, code in (("good", 200), ("bad", 400), ("", 403)):
            assert (await harness.client.get("/v1/models", params={name: value})).status_code == code
        beside = {"authorization": "Bearer other", "x-goog-api-key": "another"}
        assert (await harness.client.get("/v1/models", params={name: "good"}, headers=beside)).status_code == 200


async def test_nothing_that_clients_were_seen_to_send_is_refused(harness: Harness) -> None:
    rows = [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]
    asked = {(row["method"], row["path"]) for row in rows if "?" in row["path"] and "upload_id" not in row["path"]}
    assert len(asked) > 8
    for method, path in sorted(asked):
        answer = await harness.client.request(method, path.replace("pageToken=t2", "pageToken="), json=HI)
        assert "Cannot bind" not in answer.text
        assert answer.status_code in (200, 403, 404, 501), (path, answer.text)
