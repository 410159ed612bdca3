"""GET, LIST, DELETE and download of files."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from support.fakes import Harness

RAW = {"X-Goog-Upload-Protocol": "raw", "content-type": "text/html"}


async def add(harness: Harness, data: bytes = b"<p>hi", path: str = "/upload/v1beta/files") -> dict[str, Any]:
    answer = await harness.client.post(path, content=data, headers=RAW)
    assert answer.status_code == 200, answer.text
    file: dict[str, Any] = answer.json()["file"]
    return file


async def test_a_file_is_told_whole(harness: Harness) -> None:
    file = await add(harness)
    assert set(file) == {
        "name",
        "mimeType",
        "sizeBytes",
        "createTime",
        "updateTime",
        "expirationTime",
        "sha256Hash",
        "uri",
        "downloadUri",
        "state",
        "source",
    }
    assert re.fullmatch(r"files/[a-z0-9]{24}", file["name"])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", file[f"{t}Time"]) for t in ("create", "update"))
    for prefix in ("", "/v1", "/v1beta", "/genai/v1alpha"):
        answer = await harness.client.get(f"{prefix}/{file['name']}")
        assert answer.json()["sizeBytes"] == "5"
    assert (await harness.client.get(file["uri"])).json() == file
    assert (await harness.client.get(f"/v1beta/files/{file['uri']}")).json() == file


async def test_a_download_cannot_become_a_page_of_this_origin(harness: Harness) -> None:
    file = await add(harness)
    for path in (
        file["downloadUri"],
        f"/{file['name']}:download",
        f"/download/v1beta/{file['name']}:download?alt=media",
    ):
        answer = await harness.client.get(path)
        assert (answer.content, answer.headers["content-type"]) == (b"<p>hi", "text/html")
        assert answer.headers["content-length"] == "5"
        assert answer.headers["content-disposition"] == "attachment"
        assert answer.headers["x-content-type-options"] == "nosniff"
    wrong = await harness.client.get(f"/{file['name']}:download?alt=json")
    assert (wrong.status_code, "alt=media" in wrong.json()["error"]["message"]) == (400, True)


async def test_pages(harness: Harness) -> None:
    assert (await harness.client.get("/v1beta/files")).json() == {}
    names = [(await add(harness))["name"] for _ in range(12)][::-1]
    first = (await harness.client.get("/v1beta/files")).json()
    assert [file["name"] for file in first["files"]] == names[:10]
    rest = (await harness.client.get(f"/v1beta/files?pageToken={first['nextPageToken']}&pageSize=1000")).json()
    assert [file["name"] for file in rest["files"]] == names[10:]
    assert "nextPageToken" not in rest
    for query in ("pageSize=-1", "pageSize=x", "pageToken=x"):
        assert (await harness.client.get(f"/v1beta/files?{query}")).status_code == 400


async def test_a_deleted_file_is_gone(harness: Harness) -> None:
    file = await add(harness)
    answer = await harness.client.request("DELETE", f"/v1beta/{file['name']}", content=b"{}")
    assert (answer.status_code, answer.json()) == (200, {})
    for method, path in (("GET", file["uri"]), ("GET", file["downloadUri"]), ("DELETE", file["uri"])):
        assert (await harness.client.request(method, path)).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/v1beta/files/..%2f..%2fetc%2fpasswd",
        "/v1beta/files/%2e%2e",
        "/v1beta/files/" + "a" * 10_000,
        "/v1beta/files/A",
        "/v1beta/files/a%00b",
        "/v1beta/files/..%2ffiles.db:download",
        "/v1beta/files/nothere",
        "/v1beta/files/nothere:download?alt=media",
        "/v1beta/files/x/y",
        "/v1%E4%B8%AD/files/x",
        "/v1beta/files/x:other",
    ],
)
async def test_what_is_no_file_is_refused_and_never_a_path(harness: Harness, path: str) -> None:
    for method in ("GET", "DELETE"):
        answer = await harness.client.request(method, path)
        assert answer.status_code in (403, 404, 405), answer.text
        assert answer.status_code != 405 or (method == "DELETE" and "download" in path)
        assert len(answer.text) < 1000


async def test_a_missing_file_is_refused_in_the_words_of_the_real_service(harness: Harness) -> None:
    for method, verb in (("GET", ""), ("DELETE", ""), ("GET", ":download?alt=media")):
        answer = await harness.client.request(method, f"/v1beta/files/doesnotexist123{verb}")
        assert answer.status_code == 403
        assert answer.json()["error"] == {
            "code": 403,
            "message": "You do not have permission to access the File doesnotexist123 or it may not exist.",
            "status": "PERMISSION_DENIED",
        }


@pytest.mark.parametrize("name", ["owui-v1-61ed4729e1359829", "123-456", "a--b", "x" * 19 + "-" + "y" * 20, "a"])
async def test_a_name_may_hold_dashes(harness: Harness, name: str) -> None:
    client, data = harness.client, b"The dog is called Rufus."
    start = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    started = await client.post("/upload/v1beta/files", json={"file": {"name": f"files/{name}"}}, headers=start)
    last = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
    file = (await client.post(started.headers["X-Goog-Upload-URL"], content=data, headers=last)).json()["file"]
    assert file["name"] == f"files/{name}"
    assert (await client.get(f"/v1beta/files/{name}")).json() == file
    assert (await client.get(f"/v1beta/files/{file['uri']}")).json() == file
    assert (await client.get(file["downloadUri"])).content == data
    for uri in (file["uri"], file["name"], f"https://generativelanguage.googleapis.com/v1beta/files/{name}"):
        used = {"contents": [{"parts": [{"fileData": {"fileUri": uri}}, {"text": "Name?"}]}]}
        assert (await harness.count(used)).status_code == 200
        assert (await harness.generate(used)).status_code == 200
    assert [listed["name"] for listed in (await client.get("/v1beta/files?pageSize=1")).json()["files"]] == [
        file["name"]
    ]
    assert (await client.delete(f"/v1beta/files/{name}")).status_code == 200


@pytest.mark.parametrize("name", ["-a", "a-", "-", "A-b", "a_b", "a" * 41, "a.b", "ä"])
async def test_what_cannot_be_a_name(harness: Harness, name: str) -> None:
    start = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    refused = await harness.client.post("/upload/v1beta/files", json={"file": {"name": f"files/{name}"}}, headers=start)
    assert (refused.status_code, "digits and dashes (not at the ends)" in refused.text) == (400, True)
    assert (await harness.client.get(f"/v1beta/files/{name}")).status_code == 403


async def test_pages_go_on_behind_a_name_with_dashes(harness: Harness) -> None:
    for name in ("a-1", "b-2", "c-3"):
        body = b'{"file":{"name":"files/%s"}}' % name.encode()
        form = b"--x\r\nContent-Type: application/json\r\n\r\n%s\r\n--x\r\n\r\nhi\r\n--x--" % body
        kind = {"content-type": "multipart/related; boundary=x"}
        assert (await harness.client.post("/upload/v1/files", content=form, headers=kind)).status_code == 200
    seen, token = [], ""
    for _ in range(3):
        page = (await harness.client.get(f"/v1/files?pageSize=1&pageToken={token}")).json()
        seen += [file["name"] for file in page["files"]]
        token = page.get("nextPageToken", "")
    assert (seen, token) == (["files/c-3", "files/b-2", "files/a-1"], "")


async def test_files_are_made_by_uploading_alone(harness: Harness) -> None:
    for path in ("/v1beta/files", "/v1beta/files:register"):
        answer = await harness.client.post(path, json={"uris": ["gs://x"]})
        assert answer.status_code == 501
        assert "upload/v1beta/files" in answer.json()["error"]["message"]
    assert (await harness.client.put("/v1beta/files")).status_code == 405
    assert (await harness.client.patch("/v1beta/files/x")).headers["allow"] == "GET, DELETE"


async def test_methods_are_counted_by_name(harness: Harness) -> None:
    await add(harness)
    await harness.client.get("/v1beta/files")
    metrics: httpx.Response = await harness.client.get("/metrics")
    assert 'method="uploadFile"' in metrics.text
    assert 'method="listFiles"' in metrics.text
