"""Paths as clients write them, and the one form in which they are read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from support.examples import examples

from server.http.middleware.forwarded import PREFIX
from server.http.middleware.path import MAX_PREFIX, PathMiddleware, normalized
from server.storage.files.upload_url import upload_id_of

GENERATE = "/v1beta/models/m:generateContent"
SOCKET = "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
VERTEX = "projects/p/locations/us-central1/publishers/google"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (GENERATE, GENERATE),
        ("//v1beta///models//m:generateContent", GENERATE),
        (f"{GENERATE}/", GENERATE),
        ("/v1/v1beta/models/m:generateContent", GENERATE),
        ("/v1beta/v1beta/models/m:generateContent", GENERATE),
        ("/v1beta/models/models/m:generateContent", GENERATE),
        ("/models/m:generateContent", GENERATE),
        ("/m:generateContent", "/v1beta/m:generateContent"),
        (f"/v1beta/{VERTEX}/models/m:generateContent", GENERATE),
        (f"/v1beta/v1beta/{VERTEX}/models/m:generateContent", GENERATE),
        (f"/v1beta/models/{VERTEX}/models/m:generateContent", GENERATE),
        ("/v1beta/publishers/meta/models/m:generateContent", GENERATE),
        ("/v1beta/models/publishers/google/models/m:generateContent", GENERATE),
        (f"/v1beta1/{VERTEX}/models", "/v1beta1/models"),
        ("/v1/projects/p/locations/l/cachedContents/c", "/v1/cachedContents/c"),
        ("/v1/projects/p/locations/l/endpoints/7:generateContent", "/v1/endpoints/7:generateContent"),
        ("/v1/projects/p/datasets/d", "/v1/projects/p/datasets/d"),
        ("/v1beta/models/org/v1/name:countTokens", "/v1beta/models/org/v1/name:countTokens"),
        ("/v1beta/org/v1/name:countTokens", "/v1beta/org/v1/name:countTokens"),
        ("/models/org/v1/name:countTokens", "/v1beta/models/org/v1/name:countTokens"),
        ("/v1beta/models/upload/v1/files", "/v1beta/models/upload/v1/files"),
        ("/v1beta/models/models", "/v1beta/models/models"),
        ("/v1beta/files/a-b:download", "/v1beta/files/a-b:download"),
        ("/v1beta/files/files/a", "/v1beta/files/a"),
        ("/v1beta/files/files", "/v1beta/files/files"),
        ("/v1beta/files/https://host:1/x/v1/files/a:download", "/v1beta/files/a:download"),
        ("/download/v1/files/a:download", "/v1/files/a:download"),
        ("/v1beta/download/v1/files/a:download", "/v1/files/a:download"),
        ("/upload/v1/files", "/upload/v1/files"),
        ("/upload/files/", "/upload/v1beta/files"),
        ("/v1/upload/files", "/upload/v1/files"),
        ("/v1beta/upload/v1/files", "/upload/v1/files"),
        ("/v1/v1beta//upload/v1/v1beta/files", "/upload/v1beta/files"),
        ("/upload/v1/fileSearchStores/s:uploadToFileSearchStore", "/v1/fileSearchStores/s:uploadToFileSearchStore"),
        ("/v1beta/openai/chat/completions", "/v1beta/openai/chat/completions"),
        (f"/v1beta{SOCKET}", SOCKET),
        ("/v1beta/ws/other", "/v1beta/ws/other"),
        ("/healthz/", "/healthz"),
        ("//metrics", "/metrics"),
        ("/", "/"),
        ("", "/"),
        ("*", "/*"),
        ("/genai", "/genai"),
        ("/nothing/here/", "/nothing/here"),
    ],
)
def test_a_path_is_read_in_its_normal_form(sent: str, read: str) -> None:
    assert normalized(sent) == ("", read)


@pytest.mark.parametrize(
    "path", [GENERATE, "/v1/models", "/v1/files/a", "/upload/v1/files", SOCKET, "/v1/openai/models"]
)
@pytest.mark.parametrize(
    "prefix", ["/genai", "/some/proxy", "/v1/account/gateway/google", "/a%b/ü", "/upload", "/healthz"]
)
def test_what_stands_before_the_version_is_the_path_of_a_proxy(prefix: str, path: str) -> None:
    assert normalized(prefix + path) == (prefix, path)


def test_a_prefix_is_as_long_as_answers_can_repeat_it() -> None:
    longest = "/" + "x" * (MAX_PREFIX - 1)
    assert normalized(f"{longest}/v1/files") == (longest, "/v1/files")
    assert normalized(f"{longest}x/v1/files") == ("", f"{longest}x/v1/files")


@pytest.mark.parametrize(
    ("named", "sent", "prefix"),
    [
        ("", "", ""),
        ("", "/in", "/in"),
        ("/out", "", "/out"),
        ("/out", "/in", "/out/in"),
        ("/out", "/out", "/out"),
        ("/out", "/out/in", "/out/in"),
        ("/out", "/outer", "/out/outer"),
        ("/out", "/a\r\nb: c", "/out/a%0D%0Ab:%20c"),
    ],
)
async def test_addresses_have_the_prefix_that_a_proxy_names_and_the_one_in_the_path(
    named: str, sent: str, prefix: str
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    scope = {"type": "http", "path": f"{sent}/v1//files", "state": {PREFIX: named} if named else {}}
    await PathMiddleware(app)(scope, None, None)  # type: ignore[arg-type]
    assert (seen[0]["state"][PREFIX], seen[0]["path"]) == (prefix, "/v1/files")


WORDS = """
    v1 v1beta v1beta1 upload download files models publishers google projects locations p endpoints openai ws
    tunedModels google.x https: host healthz m m:generateContent files:register a:download cachedContents
    fileSearchStores upload%2Fv1 .. v1中 V1
"""
PATHS = st.lists(st.sampled_from([*WORDS.split(), ""]) | st.text("vV1fu/:%.é", max_size=4), max_size=9).map(
    lambda steps: "/" + "/".join(steps)
)


def is_exempt(path: str) -> bool:
    return upload_id_of({"method": "POST", "path": path, "query_string": b"upload_id=x"}) == "x"


@given(PATHS)
@settings(max_examples=examples(500))
def test_reading_a_path_twice_changes_nothing(path: str) -> None:
    prefix, read = normalized(path)
    assert normalized(read) == ("", read)
    steps = [step for step in path.split("/") if step]
    assert not prefix or prefix.split("/")[1:] == steps[: prefix.count("/")]


@given(PATHS)
@settings(max_examples=examples(500))
def test_only_a_path_that_ends_as_an_upload_does_is_free_of_keys(path: str) -> None:
    ends_as_one = re.search(r"(?:^|/)upload/+(?:v\d\w*/+)*files/*$", path, re.ASCII) is not None
    assert not is_exempt(normalized(path)[1]) or ends_as_one


def test_the_exemption_can_be_seen() -> None:
    assert is_exempt(normalized("/x/v1//v1beta/upload/v1/files/")[1])
    assert not is_exempt(normalized("/v1beta/models/upload/v1/files")[1])
    assert not is_exempt(normalized("/upload/v1beta/files/x")[1])
