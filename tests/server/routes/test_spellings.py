"""Every spelling of a path has the outcome of the plain one: with a right key, with a wrong one and without any."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fakes import Harness, serving, tokenizer_folder

from server.config.models_file import ModelSpec

HOST = "http://127.0.0.1"
"""Written out, since two slashes would begin a host."""
HI = {"contents": [{"parts": [{"text": "hi"}]}]}
KEYS: dict[str, dict[str, str]] = {
    "right": {"x-goog-api-key": "good"},
    "wrong": {"x-goog-api-key": "bad"},
    "none": {},
}
RAW = {"X-Goog-Upload-Protocol": "raw", "content-type": "text/plain"}
START = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
LAST = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
VERTEX = "/v1beta1/projects/p/locations/us-central1/publishers/google"

Spelling = Callable[[str], str]
ANY: list[Spelling] = [
    lambda path: path.replace("/", "//"),
    lambda path: f"{path}/",
    lambda path: f"{path}//",
    lambda path: f"/v1{path}",
    lambda path: f"/v1beta/v1beta{path}",
    lambda path: f"/genai{path}",
    lambda path: f"/some/proxy{path}/",
    lambda path: f"/v1/account/gateway/google-ai-studio{path}",
    lambda path: path.replace("/v1beta/", "/"),
    lambda path: path.replace("/v1beta/", "/v1alpha/"),
    lambda path: "/" + path[1:].replace("/", "%2F").replace(":", "%3A"),
]
OF_MODELS: list[Spelling] = [
    *ANY,
    lambda path: path.replace("/models", f"{VERTEX}/models"),
    lambda path: path.replace("/v1beta", VERTEX),
    lambda path: path.replace("/v1beta", "/v1/publishers/google"),
    lambda path: path.replace("/v1beta", f"/behind{VERTEX}") + "/",
]
OF_ONE_MODEL: list[Spelling] = [
    *OF_MODELS,
    lambda path: path.replace("models/", "models/models/"),
    lambda path: path.replace("models/", "models//models/models/"),
    lambda path: path.replace("models/", "models/publishers/google/models/"),
    lambda path: path.replace("models/", "tunedModels/") if ":" in path else path,
]
OF_FILES: list[Spelling] = [
    *ANY,
    lambda path: path.replace("files/", "files/files/"),
    lambda path: path.replace("files/", "files/https://generativelanguage.googleapis.com/v1beta/files/"),
    lambda path: f"/download{path}" if ":" in path else path,
    lambda path: f"/v1/download{path}" if ":" in path else path,
]
OF_UPLOADS: list[Spelling] = [
    *ANY,
    lambda path: f"/v1beta{path}",
    lambda path: f"/v1{path}/",
    lambda path: path.replace("/v1beta/", "/v1/v1beta/"),
    lambda path: f"/genai/v1beta/v1beta{path}",
]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    spec = ModelSpec("tiny", str(tokenizer_folder(tmp_path / "tiny")), max_output_tokens=100)
    async with serving(tmp_path / "tiny", [spec], api_keys=("good", "better")) as started:
        yield started


def shape(value: Any) -> Any:
    """A JSON value without what differs from call to call."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def outcome(answer: httpx.Response) -> Any:
    kind = answer.headers["content-type"]
    if "json" in kind:
        return answer.status_code, kind, answer.headers.get("x-goog-upload-status"), shape(answer.json())
    return answer.status_code, kind, len(answer.text)


CALLS: list[tuple[str, str, str, list[Spelling]]] = [
    ("POST", "/v1beta/models/tiny:generateContent", "", OF_ONE_MODEL),
    ("POST", "/v1beta/models/tiny:streamGenerateContent", "", OF_ONE_MODEL),
    ("POST", "/v1beta/models/tiny:streamGenerateContent", "alt=sse", OF_ONE_MODEL),
    ("POST", "/v1beta/models/tiny:countTokens", "", OF_ONE_MODEL),
    ("POST", "/v1beta/models/tiny:embedContent", "", OF_ONE_MODEL[:-1]),
    ("POST", "/v1beta/models/nobody:streamGenerateContent", "", OF_ONE_MODEL),
    ("POST", "/v1beta/models/tiny:fly", "", OF_MODELS),
    ("GET", "/v1beta/models/tiny", "", OF_ONE_MODEL),
    ("GET", "/v1beta/models", "", OF_MODELS),
    ("DELETE", "/v1beta/models", "", OF_MODELS),
    ("GET", "/v1beta/files", "", ANY),
    ("POST", "/v1beta/cachedContents", "", ANY),
    ("POST", "/v1beta/openai/chat/completions", "", ANY),
    ("GET", "/v1beta/openai/models", "", ANY),
    ("GET", "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent", "", ANY),
]


@pytest.mark.parametrize("query", ["", "upload_id=x"])
@pytest.mark.parametrize("key", KEYS)
async def test_calls(harness: Harness, key: str, query: str) -> None:
    """The id of an upload in the query opens nothing that is no upload."""
    for method, path, alt, spellings in CALLS:
        asked = f"?{alt}&{query}".replace("?&", "?")

        async def call(spelling: Spelling, path: str = path, method: str = method, asked: str = asked) -> Any:
            url = HOST + spelling(path) + asked
            return outcome(await harness.client.request(method, url, json=HI, headers=KEYS[key]))

        plain = await call(str)
        assert plain[0] == {"wrong": 400, "none": 403}.get(key, plain[0])
        for spelling in spellings:
            assert await call(spelling) == plain, (method, spelling(path))


@pytest.mark.parametrize("key", KEYS)
async def test_files(harness: Harness, key: str) -> None:
    """Each is made anew: deleting one needs one."""
    for method, verb in (("GET", ""), ("GET", ":download"), ("DELETE", "")):
        found = []
        for spelling in [str, *OF_FILES]:
            made = await harness.client.post(
                "/upload/v1beta/files", content=b"data", headers=RAW | KEYS["right"], params={"fields": "file/name"}
            )
            path = spelling(f"/v1beta/{made.json()['file']['name']}{verb}")
            found.append(outcome(await harness.client.request(method, HOST + path, headers=KEYS[key])))
        assert found == found[:1] * len(found)
        assert (found[0][0] == 200) == (key == "right")


@pytest.mark.parametrize("key", KEYS)
async def test_uploads(harness: Harness, key: str) -> None:
    """The address that start returns needs no key, whichever way it is written; all else does."""

    async def outcomes(spelling: Spelling) -> list[Any]:
        path, client = HOST + spelling("/upload/v1beta/files"), harness.client
        url = (await client.post("/upload/v1beta/files", headers=START | KEYS["right"])).headers["X-Goog-Upload-URL"]
        secret = url.partition("?")[2]
        whole = await client.post(path, content=b"data", headers=RAW | KEYS[key])
        started = await client.post(path, headers=START | KEYS[key])
        guessed = await client.post(f"{path}?upload_id=guess", content=b"data", headers=LAST | KEYS[key])
        listed = await client.get(f"{path}?{secret}", headers=KEYS[key])
        last = await client.put(f"{path}?{secret}", content=b"data", headers=LAST | KEYS[key])
        return [outcome(answer) for answer in (whole, started, guessed, listed, last)]

    plain = await outcomes(str)
    assert [answer[0] for answer in plain] == {
        "right": [200, 200, 404, 405, 200],
        "wrong": [400, 400, 404, 400, 200],
        "none": [403, 403, 404, 403, 200],
    }[key]
    for spelling in OF_UPLOADS:
        assert await outcomes(spelling) == plain, spelling("/upload/v1beta/files")


async def test_names_that_hold_versions_and_collections_stay_reachable(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tiny")
    names = ["org/v1/name", "upload/v1/files", "publishers/x", "files/y"]
    async with serving(folder, [ModelSpec(name, str(folder)) for name in names]) as harness:
        for name in names:
            for base in ("/v1beta/models", "/models", "/a/proxy/v1beta/models", "/v1/v1beta/models/models"):
                answer = await harness.client.post(f"{base}/{name}:generateContent", json=HI)
                assert answer.json()["modelVersion"] == name, (base, name)
        for path in ("/org/v1/name", "/v1beta/org/v1/name", "/a/proxy/v1beta/org/v1/name"):
            answer = await harness.client.post(f"{path}:generateContent", json=HI)
            assert answer.json()["modelVersion"] == "org/v1/name", path


async def test_addresses_repeat_the_prefix_that_the_client_used(harness: Harness) -> None:
    key = KEYS["right"]
    for prefix in ("/genai", "/v1/a/b", "/a%20b"):
        started = await harness.client.post(f"{prefix}/v1beta/upload/v1/files/", headers=START | key)
        url = started.headers["X-Goog-Upload-URL"]
        assert url.startswith(f"http://127.0.0.1{prefix}/upload/v1/files?upload_id=")
        file = (await harness.client.post(url, content=b"data", headers=LAST)).json()["file"]
        assert file["uri"] == f"http://127.0.0.1{prefix}/v1/{file['name']}"
        assert (await harness.client.get(file["downloadUri"], headers=key)).text == "data"


@pytest.mark.parametrize("name", ["tiny", "models/tiny", f"{VERTEX[9:]}/models/tiny", "publishers/google/models/tiny"])
async def test_a_body_may_name_the_model_as_its_path_does(harness: Harness, name: str) -> None:
    for method in ("generateContent", "countTokens"):
        answer = await harness.client.post(
            f"{VERTEX}/models/tiny:{method}", json=HI | {"model": name}, headers=KEYS["right"]
        )
        assert answer.status_code == 200, answer.text
