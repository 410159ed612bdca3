"""What has held against strangers goes on holding, on the real server: keys, neighbours, templates, limits, modes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.server import RunningServer, command_line, running_server
from support.tiny import CHAT_TEMPLATE, tiny_model_folder
from support.waiting import wait_until

pytestmark = pytest.mark.product

MODEL = "smollm2-135m-instruct"
SESAME, MELON = "sesame-d1f0a9", "melon-77c3e2"
ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__['os'].popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__.os.environ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "filter": "{{ messages | attr('__class__') }}{{ (messages | attr('append'))(1) }}",
    "os": "{{ os.environ['HUSH'] }}",
    "import": "{% import 'os' as os %}{{ os.environ }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{{ messages.append({'role': 'user'}) }}{{ messages.clear() }}",
}
"""What a template of a hostile model folder may try, by the word that sets it off."""


def hostile_template() -> str:
    attacks = "".join(
        f"{{% if messages[-1].content == '{word}' %}}{attack}{{% endif %}}" for word, attack in ATTACKS.items()
    )
    return attacks + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def keyed(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with two keys, the built-in model and one whose template is hostile."""
    folder = tmp_path_factory.mktemp("held")
    hostile = tiny_model_folder(folder / "hostile")
    (hostile / "chat_template.jinja").write_text(hostile_template())
    entries = {MODEL: {"source": str(builtin_model)}, "hostile": {"source": str(hostile)}}
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": entries}))
    environment = {"CASTOR_API_KEYS": f"{SESAME},{MELON}", "HUSH": "hush-5b21"}
    with running_server(folder, "--models", str(folder / "models.yaml"), environment=environment) as server:
        yield server


def ask(server: RunningServer, text: str, *, key: str = SESAME, model: str = MODEL, **config: Any) -> httpx.Response:
    body = {"contents": [{"parts": [{"text": text}]}], "generationConfig": {"maxOutputTokens": 1, **config}}
    return server.client.post(f"/v1beta/models/{model}:generateContent", json=body, headers={"x-goog-api-key": key})


def test_no_key_is_told_again(keyed: RunningServer) -> None:
    """Keys that are right and wrong, in every place where a client may put one."""
    path = f"/v1beta/models/{MODEL}:generateContent"
    wrong = "wrong-0c44d8"
    answers = []
    for key in (SESAME, wrong):
        for headers in ({"x-goog-api-key": key}, {"authorization": f"Bearer {key}"}, {"authorization": f"Basic {key}"}):
            for body in (b"{", b"{}", b'{"nonsense": 1}'):
                answers.append(keyed.client.post(path, content=body, headers=headers))
        for query in (f"key={key}", f"key={key}&key=x", f"alt=sse&key={key}", f"KEY={key}", f"x=1&amp;key={key}"):
            answers.append(keyed.client.post(f"{path}?{query}", content=b"{"))
            answers.append(keyed.client.get(f"/v1beta/files?pageToken=x&{query}"))
            answers.append(keyed.client.get(f"/v1beta/nowhere?{query}"))
        if key != wrong:
            for place in (f"{path}&key={key}", f"{path}%3Fkey={key}", f"/v1beta/files/{key}"):
                answers.append(keyed.client.post(place, content=b"{}"))
    assert {answer.status_code for answer in answers} <= {400, 403, 404}
    metrics = keyed.client.get("/metrics", headers={"authorization": f"Bearer {MELON}"})
    assert metrics.status_code == 200
    for secret in (SESAME, MELON, wrong):
        assert all(secret not in answer.text and secret not in str(answer.headers) for answer in answers)
        assert secret not in metrics.text
        assert secret not in keyed.log()
        assert not any(secret.encode() in command_line(str(pid)) for pid in keyed.engine_pids())


def test_a_prompt_of_another_key_is_not_in_the_cache(keyed: RunningServer) -> None:
    text = "The sluice keeper writes down who passes, and tells nobody. " * 20

    def cached(key: str) -> int:
        usage = ask(keyed, text, key=key).json()["usageMetadata"]
        return int(usage.get("cachedContentTokenCount", 0))

    # The first blocks hold the system prompt, and they are not shared either.
    assert [cached(SESAME), cached(MELON)] == [0, 0]
    assert cached(SESAME) > 150
    assert cached(MELON) > 150


@pytest.mark.parametrize("word", ATTACKS)
def test_a_template_gets_at_nothing(keyed: RunningServer, word: str) -> None:
    answer = ask(keyed, word, model="hostile")
    assert answer.status_code == 400, answer.text
    assert "chat template" in answer.json()["error"]["message"]
    assert not any(secret in answer.text for secret in ("hush-5b21", "root:", "uid=", "<class", SESAME))
    assert ask(keyed, "peace", model="hostile").status_code == 200


def test_most_candidates_with_most_logprobs(castor: RunningServer) -> None:
    config = {"candidateCount": 8, "responseLogprobs": True, "logprobs": 20, "maxOutputTokens": 24, "seed": 3}
    body = {"contents": [{"parts": [{"text": "Name a river."}]}], "generationConfig": config}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: castor.generate(body), range(4)))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        candidates = answer.json()["candidates"]
        assert [candidate["index"] for candidate in candidates] == list(range(8))
        for candidate in candidates:
            result = candidate["logprobsResult"]
            assert len(result["chosenCandidates"]) == len(result["topCandidates"]) == candidate["tokenCount"]
            assert {len(top["candidates"]) for top in result["topCandidates"]} == {20}


def test_nobody_else_on_the_machine_reads_what_is_kept(keyed: RunningServer) -> None:
    headers = {"X-Goog-Upload-Protocol": "raw", "x-goog-api-key": SESAME}
    answer = keyed.client.post("/upload/v1beta/files", content=b"mine", headers=headers)
    assert answer.status_code == 200
    data = keyed.log_path.parent / "data"
    kept = [path for path in data.rglob("*") if path.is_file()]
    assert len(kept) >= 3, "the key of signatures, the catalog and a blob"
    for path in kept:
        on_the_way = [path, *(parent for parent in path.parents if parent.is_relative_to(data))]
        assert any(stat.S_IMODE(place.stat().st_mode) & 0o077 == 0 for place in on_the_way), path


def test_the_server_listens_on_the_loopback_and_engines_nowhere(keyed: RunningServer) -> None:
    pids = [keyed.process.pid, *keyed.engine_pids()]
    assert len(pids) == 3
    listening = {pid: sorted(listeners(pid)) for pid in pids}
    assert listening[keyed.process.pid] == [f"127.0.0.1:{keyed.port}"]
    # Of the sockets to the engines not even the paths are left.
    for pid in pids[1:]:
        assert listening[pid] == []
        address = command_line(str(pid)).rstrip(b"\0").rpartition(b"\0")[2].decode()
        assert address.startswith("ipc://")
        assert not os.path.exists(address.removeprefix("ipc://"))


def listeners(pid: int) -> Iterator[str]:
    """The IPv4 and IPv6 addresses that a process listens on."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            (
                _,
                local,
                _,
                state,
                *_,
            ) = line.split()[:4]
            inode = line.split()[9]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                host, port = local.split(":")
                octets = bytes.fromhex(host)[::-1]
                yield f"{'.'.join(map(str, octets)) if table == 'tcp' else host}:{int(port, 16)}"


def test_a_path_cannot_write_a_line_of_the_log(keyed: RunningServer) -> None:
    forged = '{"status": 200, "forged": true}'
    before = len(keyed.request_log())
    for path in (f"/v1beta/x%0a{forged}", f"/v1beta/x%0d%0a{forged}", f"/v1beta/%e2%80%a8{forged}"):
        answer = keyed.client.get(path, headers={"x-goog-api-key": SESAME})
        assert answer.status_code == 404, answer.text
    wait_until(lambda: len(keyed.request_log()) >= before + 3)
    entries = [json.loads(line) for line in keyed.log().split("\n") if line.startswith("{")]
    assert not any("forged" in entry for entry in entries)
