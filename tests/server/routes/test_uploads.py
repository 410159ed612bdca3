"""POST upload/files: every form, every wrong step."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fakes import Harness, serving, tokenizer_folder

URL = "/upload/v1beta/files"
COMMAND, OFFSET, STATUS = "X-Goog-Upload-Command", "X-Goog-Upload-Offset", "X-Goog-Upload-Status"
RECEIVED = "X-Goog-Upload-Size-Received"
START = {COMMAND: "start", "X-Goog-Upload-Protocol": "resumable"}


@pytest.fixture
async def quota(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(tokenizer_folder(tmp_path / "t"), max_file_bytes=100, max_key_file_bytes=150) as started:
        yield started


async def start(client: httpx.AsyncClient, said: Any = None, path: str = URL, **headers: str) -> str:
    body = {"file": said} if said is not None else None
    answer = await client.post(path, json=body, headers=START | {k.replace("_", "-"): v for k, v in headers.items()})
    assert answer.status_code == 200, answer.text
    assert (answer.headers[STATUS], answer.json()) == ("active", {})
    assert answer.headers["X-Goog-Upload-Control-URL"] == answer.headers["X-Goog-Upload-URL"]
    return answer.headers["X-Goog-Upload-URL"]


async def send(client: httpx.AsyncClient, url: str, data: bytes, offset: Any = 0, command: str = "upload, finalize"):
    return await client.post(url, content=data, headers={COMMAND: command, OFFSET: str(offset)})


async def stored(client: httpx.AsyncClient, file: dict[str, Any]) -> bytes:
    answer = await client.get(file["downloadUri"])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == file["mimeType"]
    return answer.content


def message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("path", [URL, "/genai" + URL, "/upload/files", "/v1/upload/v1beta/files", "/upload/v1/files"])
async def test_a_resumable_upload_step_by_step(harness: Harness, path: str) -> None:
    said = {"display_name": "disp", "mime_type": "text/plain", "size_bytes": 11}
    url = await start(harness.client, said, path)
    first = await send(harness.client, url, b"hello ", 0, "upload")
    assert (first.status_code, first.headers[STATUS], first.headers[RECEIVED]) == (200, "active", "6")
    asked = await harness.client.post(url, headers={COMMAND: "query"})
    assert (asked.headers[STATUS], asked.headers[RECEIVED]) == ("active", "6")
    last = await send(harness.client, url, b"world", 6)
    assert (last.status_code, last.headers[STATUS]) == (200, "final")
    file = last.json()["file"]
    assert {key: file[key] for key in ("displayName", "mimeType", "sizeBytes", "state", "source")} == {
        "displayName": "disp",
        "mimeType": "text/plain",
        "sizeBytes": "11",
        "state": "ACTIVE",
        "source": "UPLOADED",
    }
    assert file["sha256Hash"] == base64.b64encode(hashlib.sha256(b"hello world").digest()).decode()
    version = "v1" if path == "/upload/v1/files" else "v1beta"
    mount = "/genai" if path.startswith("/genai") else ""
    assert file["uri"] == f"http://127.0.0.1{mount}/{version}/{file['name']}"
    assert await stored(harness.client, file) == b"hello world"


async def test_a_last_step_that_is_repeated_tells_the_file_again(harness: Harness) -> None:
    url = await start(harness.client, {})
    file = (await send(harness.client, url, b"abc")).json()["file"]
    for again in (await send(harness.client, url, b"abc"), await harness.client.post(url, headers={COMMAND: "query"})):
        assert (again.headers[STATUS], again.json()["file"]) == ("final", file)
    refused = await send(harness.client, url, b"abd")
    assert (refused.status_code, "differ" in message(refused)) == (400, True)


async def test_an_empty_file_and_a_finalize_alone(harness: Harness) -> None:
    url = await start(harness.client, {"sizeBytes": "0"})
    assert (await send(harness.client, url, b"")).json()["file"]["sizeBytes"] == "0"
    url = await start(harness.client, {})
    await send(harness.client, url, b"abc", 0, "upload")
    file = (await harness.client.post(url, headers={COMMAND: "finalize"})).json()["file"]
    assert await stored(harness.client, file) == b"abc"


async def test_what_start_says_in_headers(harness: Harness) -> None:
    url = await start(
        harness.client,
        None,
        X_Goog_Upload_Header_Content_Length="3",
        X_Goog_Upload_Header_Content_Type="text/csv",
        X_Goog_Upload_File_Name="table.csv",
    )
    file = (await send(harness.client, url, b"a,b")).json()["file"]
    assert (file["mimeType"], file["displayName"]) == ("text/csv", "table.csv")


async def test_what_only_the_server_knows_is_named_as_ignored(harness: Harness) -> None:
    answer = await harness.client.post(URL, json={"file": {"uri": "x", "state": "ACTIVE"}}, headers=START)
    assert answer.headers["x-castor-ignored"] == "file.uri, file.state"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"file": {"nme": "x"}}, "Unknown name"),
        ({"file": {"name": "files/No"}}, "lowercase letters, digits and dashes"),
        ({"file": {"mimeType": "text"}}, "a type and a subtype"),
        ({"file": {"mimeType": "text/plain\r\nx: y"}}, "a type and a subtype"),
        ({"file": {"mimeType": "text/plain;\r\n x=y"}}, "a type and a subtype"),
        ({"file": {"displayName": "x" * 513}}, "at most 512"),
        ({"file": {"sizeBytes": "-1"}}, "at least 0"),
        ({"file": {"sizeBytes": "1.5"}}, "TYPE_INT64"),
        ({"file": {"sizeBytes": "9" * 5000}}, "TYPE_INT64"),
        ([1], "CreateFileRequest"),
    ],
)
async def test_what_is_said_wrongly_is_refused_by_name(harness: Harness, body: Any, words: str) -> None:
    answer = await harness.client.post(URL, json=body, headers=START)
    assert answer.status_code == 400
    assert words in message(answer)


async def test_a_name_is_given_once(harness: Harness) -> None:
    url = await start(harness.client, {"name": "files/mine"})
    taken = await harness.client.post(URL, json={"file": {"name": "files/mine"}}, headers=START)
    assert (taken.status_code, taken.json()["error"]["status"]) == (409, "ALREADY_EXISTS")
    assert (await send(harness.client, url, b"x")).json()["file"]["name"] == "files/mine"
    assert (await harness.client.get("/v1beta/files/mine")).status_code == 200


@pytest.mark.parametrize("command", ["", "begin", "upload, cancel", "finalize, upload", "start, upload"])
async def test_an_unknown_command_is_refused(harness: Harness, command: str) -> None:
    url = await start(harness.client, {})
    for target in (url, URL):
        answer = await harness.client.post(target, headers={COMMAND: command, "X-Goog-Upload-Protocol": "resumable"})
        assert (answer.status_code, "must be one of: start; upload" in message(answer)) == (400, True)


async def test_a_command_at_the_wrong_address_is_refused(harness: Harness) -> None:
    answer = await harness.client.post(URL, headers={COMMAND: "upload", OFFSET: "0"})
    assert (answer.status_code, "X-Goog-Upload-URL" in message(answer)) == (400, True)
    url = await start(harness.client, {})
    answer = await harness.client.post(url, headers={COMMAND: "start"})
    assert (answer.status_code, "was started" in message(answer)) == (400, True)


@pytest.mark.parametrize(
    ("offset", "words"),
    [("1", "1 is wrong: 0 bytes"), ("-1", "'-1'"), ("x", "'x'"), ("1e3", "1e3"), ("9" * 30, "999"), (None, "missing")],
)
async def test_a_wrong_offset_is_refused(harness: Harness, offset: str | None, words: str) -> None:
    url = await start(harness.client, {})
    headers = {COMMAND: "upload"} | ({OFFSET: offset} if offset is not None else {})
    answer = await harness.client.post(url, content=b"x", headers=headers)
    assert (answer.status_code, words in message(answer)) == (400, True), answer.text


async def test_sizes_that_lie_are_refused(harness: Harness) -> None:
    url = await start(harness.client, {"sizeBytes": 4})
    short = await send(harness.client, url, b"abc")
    assert (short.status_code, "declared 4 bytes, but 3 were received" in message(short)) == (400, True)
    long = await send(harness.client, url, b"abcde")
    assert (long.status_code, "has 4 bytes, but bytes up to 5" in message(long)) == (400, True)
    assert (await send(harness.client, url, b"d", 3)).headers[STATUS] == "final"
    headers = START | {"X-Goog-Upload-Header-Content-Length": "5"}
    differ = await harness.client.post(URL, json={"file": {"sizeBytes": 4}}, headers=headers)
    assert (differ.status_code, "Content-Length says: 5" in message(differ)) == (400, True)


async def test_a_cancelled_upload_is_over(harness: Harness) -> None:
    url = await start(harness.client, {})
    cancelled = await harness.client.post(url, headers={COMMAND: "cancel"})
    assert (cancelled.status_code, cancelled.headers[STATUS]) == (200, "cancelled")
    for command in ("query", "cancel", "upload", "finalize"):
        answer = await harness.client.post(url, headers={COMMAND: command, OFFSET: "0"})
        assert (answer.status_code, "Start a new one" in message(answer)) == (404, True)


async def test_two_writers_on_one_upload(harness: Harness) -> None:
    url = await start(harness.client, {})
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"ab"
        begun.set()
        await go_on.wait()
        yield b"cd"

    headers = {COMMAND: "upload, finalize", OFFSET: "0"}
    first = asyncio.create_task(harness.client.post(url, content=slow(), headers=headers))
    await begun.wait()
    second = await send(harness.client, url, b"xx")
    assert (second.status_code, second.json()["error"]["status"]) == (409, "ABORTED")
    go_on.set()
    assert await stored(harness.client, (await first).json()["file"]) == b"abcd"


async def test_a_body_that_stalls_is_a_408_and_what_came_is_kept(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), body_stall_seconds=0.2) as harness:
        url = await start(harness.client, {})

        async def stalling() -> AsyncIterator[bytes]:
            yield b"abc"
            await asyncio.sleep(20)

        answer = await harness.client.post(url, content=stalling(), headers={COMMAND: "upload", OFFSET: "0"})
        assert (answer.status_code, answer.headers["connection"]) == (408, "close")
        assert "0.2 seconds" in message(answer)
        asked = await harness.client.post(url, headers={COMMAND: "query"})
        assert asked.headers[RECEIVED] == "3"


async def test_a_file_that_drips_is_a_408_and_what_came_is_kept(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), body_seconds=0.3) as harness:
        url = await start(harness.client, {})

        async def dripping() -> AsyncIterator[bytes]:
            while True:
                yield b"a"
                await asyncio.sleep(0.01)

        answer = await harness.client.post(url, content=dripping(), headers={COMMAND: "upload", OFFSET: "0"})
        assert answer.status_code == 408
        assert "at least 16384 bytes a second" in message(answer)
        asked = await harness.client.post(url, headers={COMMAND: "query"})
        assert int(asked.headers[RECEIVED]) > 0


async def test_other_bodies_have_no_more_time_than_the_setting_says(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), body_seconds=0.3) as harness:

        async def dripping() -> AsyncIterator[bytes]:
            while True:
                yield b" "
                await asyncio.sleep(0.01)

        for path in (URL, "/v1beta/models/tiny:generateContent"):
            answer = await harness.client.post(path, content=dripping(), headers={COMMAND: "start"})
            assert (answer.status_code, answer.headers["connection"]) == (408, "close")
            assert "not complete after 0.3 seconds" in message(answer)


def form(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end


def field(name: str, data: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data


METADATA = field("metadata", b'{"file": {"displayName": "d", "mimeType": "text/plain"}}')
FORM = {"content-type": "multipart/form-data; boundary=x"}
RELATED = {"content-type": "multipart/related; boundary=x", "X-Goog-Upload-Protocol": "multipart"}


async def test_a_multipart_form(harness: Harness) -> None:
    data = random.Random(1).randbytes(5000) + b"\r\n--y" + random.Random(2).randbytes(5000)
    answer = await harness.client.post(URL, content=form(METADATA, field("file", data)), headers=FORM)
    assert (answer.status_code, answer.headers[STATUS]) == (200, "final"), answer.text
    file = answer.json()["file"]
    assert (file["displayName"], file["mimeType"]) == ("d", "text/plain")
    assert await stored(harness.client, file) == data


async def test_a_form_without_metadata_is_described_by_its_file(harness: Harness) -> None:
    part = b'Content-Disposition: form-data; name="file"; filename="C:\\\\x\\\\n\xc3\xa9.md"\r\n\r\nhello'
    file = (await harness.client.post(URL, content=form(part), headers=FORM)).json()["file"]
    assert (file["displayName"], file["mimeType"]) == ("né.md", "text/markdown")
    by_httpx = await harness.client.post(URL, files={"file": ("a.bin", b"", "application/x-b")})
    file = by_httpx.json()["file"]
    assert (file["displayName"], file["mimeType"], file["sizeBytes"]) == ("a.bin", "application/x-b", "0")


async def test_multipart_related(harness: Harness) -> None:
    said = b'Content-Type: application/json\r\n\r\n{"displayName": "bare"}'
    body = form(said, b"Content-Type: image/png\r\n\r\n\x89PNG")
    file = (await harness.client.post(URL + "?uploadType=multipart", content=body, headers=RELATED)).json()["file"]
    assert (file["displayName"], file["mimeType"]) == ("bare", "image/png")
    assert await stored(harness.client, file) == b"\x89PNG"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (form(field("file", b"data"), end=b""), "without its last boundary"),
        (form(METADATA), "no part with the name file"),
        (form(), "without|no part|cannot be read"),
        (b"no boundary at all", "cannot be read"),
        (form(b"Content-Type: text/plain\r\n\r\ndata"), "no name"),
        (form(field("other", b"data")), "'other'"),
        (form(METADATA, METADATA, field("file", b"x")), "two parts"),
        (form(field("file", b"x"), METADATA), "comes after the file"),
        (form(field("file", b"x"), field("file", b"y")), "comes after the file"),
        (form(b"Content-Transfer-Encoding: base64\r\n" + field("file", b"aGk=")), "'base64'"),
        (form(field("metadata", b"{"), field("file", b"x")), "Invalid JSON"),
        (form(field("metadata", b" " * 70_000), field("file", b"x")), "65536"),
        (form(field("metadata", b'{"sizeBytes": 2}'), field("file", b"x")), "declared 2 bytes, but 1"),
        (form(b"A: " + b"x" * 10_000 + b"\r\n\r\n", field("file", b"x")), "cannot be read"),
    ],
)
async def test_a_form_that_is_wrong_leaves_nothing_behind(harness: Harness, body: bytes, words: str) -> None:
    answer = await harness.client.post(URL, content=body, headers=FORM)
    assert answer.status_code == 400, answer.text
    assert any(word in message(answer) for word in words.split("|")), message(answer)
    assert (await harness.client.get("/v1beta/files")).json() == {}
    assert list(harness.services.files.blobs.iterdir()) == []
    assert harness.services.files.catalog.blobs() == {}


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/related; boundary=" + "x" * 71]
)
async def test_a_boundary_that_is_none(harness: Harness, kind: str) -> None:
    answer = await harness.client.post(URL, content=b"--x--", headers={"content-type": kind})
    assert (answer.status_code, "boundary" in message(answer)) == (400, True)


@pytest.mark.parametrize(
    ("query", "headers"),
    [("", {"X-Goog-Upload-Protocol": "raw"}), ("?uploadType=media", {}), ("?upload_protocol=raw", {})],
)
async def test_a_raw_body(harness: Harness, query: str, headers: dict[str, str]) -> None:
    headers |= {"content-type": "text/x-y; charset=latin-1", "X-Goog-Upload-File-Name": "n.y"}
    answer = await harness.client.post(URL + query, content=b"\xe9", headers=headers)
    file = answer.json()["file"]
    assert (file["mimeType"], file["displayName"]) == ("text/x-y; charset=latin-1", "n.y")
    assert await stored(harness.client, file) == b"\xe9"


async def test_what_curl_says_of_any_body_is_not_its_type(harness: Harness) -> None:
    headers = {"X-Goog-Upload-Protocol": "raw", "content-type": "application/x-www-form-urlencoded"}
    file = (await harness.client.post(URL, content=b"x", headers=headers)).json()["file"]
    assert file["mimeType"] == "application/octet-stream"


@pytest.mark.parametrize("headers", [{}, {"X-Goog-Upload-Protocol": "magic"}, {"content-type": "application/json"}])
async def test_a_form_of_upload_that_is_not_known(harness: Harness, headers: dict[str, str]) -> None:
    answer = await harness.client.post(URL, content=b"{}", headers=headers)
    assert (answer.status_code, "must be resumable, multipart or raw" in message(answer)) == (400, True)


async def test_quotas_name_both_numbers(quota: Harness) -> None:
    raw = {"X-Goog-Upload-Protocol": "raw"}

    async def chunked(size: int) -> AsyncIterator[bytes]:
        for _ in range(size):
            yield b"x"

    async def kept(size: int, *, told: bool = True) -> httpx.Response:
        return await quota.client.post(URL, content=b"x" * size if told else chunked(size), headers=raw)

    for told in (True, False):
        over = await kept(101, told=told)
        assert over.status_code == 413, over.text
        assert "101 bytes or more; at most 100" in message(over)
    assert (await kept(100)).status_code == 200
    for told in (True, False):
        full = await kept(51, told=told)
        assert full.status_code == 429
        assert "hold 100 bytes, and 51 more" in message(full)
        assert "limit of 150" in message(full)
    assert (await kept(50, told=False)).status_code == 200
    assert len(list(quota.services.files.blobs.iterdir())) == 2


async def test_a_form_that_cannot_fit_is_refused_before_it_is_read(quota: Harness) -> None:
    body = form(field("file", b"x" * 2_000_000))
    answer = await quota.client.post(URL, content=body, headers=FORM)
    assert answer.status_code == 413


async def test_a_form_that_never_ends_is_refused(quota: Harness) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield form(field("file", b"x"))
        while True:
            yield b"x" * 65_536

    answer = await quota.client.post(URL, content=endless(), headers=FORM)
    assert answer.status_code == 413
    assert (await quota.client.get("/v1beta/files")).json() == {}


async def test_a_full_disk_is_told_as_such(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    answer = await harness.client.post(URL, content=b"x", headers={"X-Goog-Upload-Protocol": "raw"})
    assert (answer.status_code, "disk" in message(answer)) == (429, True)


async def test_the_name_of_a_file_is_no_address(harness: Harness) -> None:
    for name, mime_type in (("data:text/html,<x>", "application/octet-stream"), ("//[x.md", "text/markdown")):
        headers = {"X-Goog-Upload-Protocol": "raw", "X-Goog-Upload-File-Name": name}
        file = (await harness.client.post(URL, content=b"x", headers=headers)).json()["file"]
        assert file["mimeType"] == mime_type


async def test_an_encoded_body_is_refused(harness: Harness) -> None:
    headers = {"X-Goog-Upload-Protocol": "raw", "content-encoding": "gzip"}
    answer = await harness.client.post(URL, content=b"x", headers=headers)
    assert (answer.status_code, "gzip" in message(answer)) == (400, True)


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
async def test_other_methods_are_told_what_is_right(harness: Harness, method: str) -> None:
    answer = await harness.client.request(method, URL)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST, PUT")


async def test_the_upload_url_authorises_itself_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), api_keys=("one", "two")) as harness:
        client, key = harness.client, {"x-goog-api-key": "one"}
        assert (await client.post(URL, headers=START)).status_code == 403
        url = (await client.post(URL, headers=START | key)).headers["X-Goog-Upload-URL"]
        file = (await send(client, url, b"abc")).json()["file"]
        mine = f"/v1beta/{file['name']}"
        assert (await client.get(mine, headers=key)).json() == file
        assert (await client.get(mine)).status_code == 403
        raw = {"X-Goog-Upload-Protocol": "raw"}
        for doubled in ("?upload_id=x&upload_id=", "?upload_id=&upload_id=x", "?upload_id=x&upload_id=y"):
            assert (await client.post(URL + doubled, content=b"x", headers=raw)).status_code == 403
            refused = await client.post(URL + doubled, content=b"x", headers=raw | key)
            assert (refused.status_code, "given once" in message(refused)) == (400, True)
        for secret in ("?upload_id=guess", "?upload_id="):
            answer = await client.post(URL + secret, headers={COMMAND: "query"})
            assert answer.status_code in (403, 404)
            listed = await client.get("/v1beta/files" + secret)
            assert listed.status_code == 403
        other = {"x-goog-api-key": "two"}
        for method, verb in (("GET", ""), ("GET", ":download"), ("DELETE", "")):
            foreign = await client.request(method, mine + verb, headers=other)
            missing = await client.request(method, f"/v1beta/files/nothere{verb}", headers=other)
            assert (foreign.status_code, foreign.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
            assert foreign.text == missing.text.replace("nothere", file["name"].removeprefix("files/"))
        assert (await client.get("/v1beta/files", headers=other)).json() == {}
        assert (await client.delete(mine, headers=key)).json() == {}
        assert (await client.post(url, headers={COMMAND: "query"})).status_code == 404


@pytest.mark.parametrize("host", ["evil\\host", "a b", "x/y", "user@host", ""])
async def test_an_address_is_never_built_from_a_host_that_is_none(tmp_path: Path, host: str) -> None:
    async with serving(tokenizer_folder(tmp_path / "t"), api_keys=("k",)) as harness:
        headers = START | {"host": host, "x-goog-api-key": "k"}
        answer = await harness.client.post(URL, headers=headers)
        assert (answer.status_code, "Host header" in message(answer)) == (400, True)


async def test_addresses_are_those_that_the_client_of_a_trusted_proxy_used(tmp_path: Path) -> None:
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "ai.example.org", "x-forwarded-prefix": "/castor"}
    async with serving(
        tokenizer_folder(tmp_path / "t"), trusted_proxies=("127.0.0.1",), allowed_hosts=("ai.example.org",)
    ) as harness:
        answer = await harness.client.post("/genai" + URL, headers=START | said)
        url = answer.headers["X-Goog-Upload-URL"]
        assert url.startswith("https://ai.example.org/castor/genai/upload/v1beta/files?upload_id=")
        sent = await harness.client.post(
            url.removeprefix("https://ai.example.org/castor"),
            content=b"x",
            headers=said | {COMMAND: "upload, finalize", OFFSET: "0"},
        )
        file = sent.json()["file"]
        assert file["uri"] == f"https://ai.example.org/castor/genai/v1beta/{file['name']}"
    async with serving(tokenizer_folder(tmp_path / "u")) as harness:
        url = (await harness.client.post(URL, headers=START | said)).headers["X-Goog-Upload-URL"]
        assert url.startswith("http://127.0.0.1/upload/")
