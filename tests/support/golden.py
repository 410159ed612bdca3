"""Golden transcripts: what clients send, and every byte that the server answers, in files that a human can read.

This is the one module of them that imports the code under test. A file of ``tests/data/golden`` holds cases; each is
played against a server of its own whose engine follows a script, so that an answer has one right form. What no two runs
share (ids, times, signatures, the version) is replaced by fixed words, and the same words in a request stand for what
was last answered there: ``UPLOAD-1`` is the id of the first upload of the case.

A file: ``server`` (template, context, settings, models; all optional) and ``cases``. A case: ``case`` (its name) and
``steps``. A step: ``send`` (method and path), ``headers``, one body (``json``; ``text``; ``pieces`` in which a body
without a length comes until it is at ``STALL``), ``engine`` (see `_script`) and ``answer``, which `write` fills in; or
``recorded``, a row of recorded_requests.jsonl, or ``raw``, the bytes of a whole request to a listening server. Answers
also keep what the engine was ``asked``: a model answers to that.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
from structlog.testing import capture_logs
from support.fakes import INFO, Answering, Harness, Pause, Script, serving, tokenizer_folder
from support.golden_files import Answer, Case, dumped, files, load
from support.templates import template_folder
from support.tiny import tiny_tokenizer
from support.waiting import PATIENCE

from engine.api.errors import EngineUnavailable, Overloaded, RequestRefused
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    Event,
    FinishReason,
    RequestError,
    RequestFinished,
    TokenLogprobs,
    TopLogprob,
)
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.weights.sources import _key, parse_source
from server.config.models_file import ModelSpec, load_specs
from server.http.serving import uvicorn_config
from server.version import castor_version

ROOT = Path(__file__).parents[2]
SECRET = "what only the log may show"
RECORDED = ROOT / "tests" / "data" / "recorded_requests.jsonl"
COMMAND_SECONDS = 120
REFUSALS: dict[str, Callable[[str], Exception]] = {
    "overloaded": Overloaded,
    "unavailable": EngineUnavailable,
    "refused": RequestRefused,
    "bug": ZeroDivisionError,
}
_RANDOM = (
    ("UPLOAD", r"upload_id=([\w-]{43})"),
    ("CALL", r"(call_[0-9a-f]{16})"),
    ("SIGNATURE", r'"thoughtSignature":"([^"]+)"'),
    ("RESPONSE", r'"responseId":"([^"]+)"'),
    ("PAGE", r'"nextPageToken":"([^"]+)"'),
    ("FILE", r"files/([a-z0-9]{24})\b"),
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_FILLERS = re.compile(r"^(data: |\[) +(?={)")
"""How many keep-alives come is a matter of time."""
_DATE = re.compile(r"^date: .*$", re.MULTILINE)
_SAMPLE = re.compile(r"^([^#\n].*) \S+$", re.MULTILINE)
_HASH = re.compile(r"(?<=models/)[0-9a-f]{16,}\b")


class Words:
    """Fixed words for what is random, in the order of its first appearance, and back."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def masked(self, text: str) -> str:
        """``text`` with a word for each random value."""
        for word, pattern in _RANDOM:
            for value in re.findall(pattern, text):
                if value not in self._values.values():
                    self._counts[word] = self._counts.get(word, 0) + 1
                    self._values[f"{word}-{self._counts[word]}"] = value
        for word, value in self._values.items():
            text = text.replace(value, word)
        return _TIME.sub("TIME", text).replace(f'"version":"{castor_version()}"', '"version":"VERSION"')

    def filled(self, text: str) -> str:
        """``text`` with the value of each word in it."""
        for word in sorted(self._values, key=len, reverse=True):
            text = text.replace(word, self._values[word])
        return text


def answers(document: Mapping[str, Any], case: Case, folder: Path) -> list[Answer]:
    """What is answered now, step by step."""
    if "run" in case["steps"][0]:
        return _ran(case["steps"], folder)
    with capture_logs():
        return asyncio.run(_played(document.get("server") or {}, case["steps"], folder))


def write(only: str = "") -> None:
    """Fill in the answers of all files, or of those whose name begins with ``only``, as the code gives them now."""
    for path in files():
        if path.stem.startswith(only):
            document = deepcopy(load(path))
            for case in document["cases"]:
                with TemporaryDirectory() as folder:
                    found = answers(document, case, Path(folder))
                for step, answer in zip(case["steps"], found, strict=True):
                    step["answer"] = answer
            head = "".join(line for line in path.read_text("utf-8").splitlines(True) if line.startswith("#"))
            path.write_text(head + dumped(document), "utf-8")


# --- Playing a case --------------------------------------------------------------------------------------------------


async def _played(server: Mapping[str, Any], steps: list[Case], folder: Path) -> list[Answer]:
    words = Words()
    async with _serving(server, folder) as harness:
        found = []
        for step in steps:
            _prepare(harness, step.get("engine") or {})
            if "raw" in step:
                found.append(await _raw(harness, step["raw"].replace("PADDING", "x" * step.get("padding", 0)), words))
            else:
                found.append(_told(await _sent(harness, step, words), words))
            if harness.engine.requests:
                found[-1]["asked"] = _asked(harness, seeded="seed" in json.dumps(step.get("json")))
        return found


@asynccontextmanager
async def _serving(server: Mapping[str, Any], folder: Path) -> AsyncIterator[Harness]:
    name = server.get("template")
    model = template_folder(folder / "tiny", name) if name else tokenizer_folder(folder / "tiny")
    specs = [
        ModelSpec(source=str(model), **{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()})
        for entry in server.get("models", ())
    ]
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in server.get("settings", {}).items()}
    async with serving(model, specs, **settings) as harness:
        harness.engine.info = replace(INFO, max_context=server.get("context", 8192), vocab_size=1000)
        yield harness


def _prepare(harness: Harness, told: Mapping[str, Any]) -> None:
    if told.get("draining"):
        harness.app.state.services.draining.set()
    harness.engine.refusal = REFUSALS[told["refuse"]](told.get("message", SECRET)) if "refuse" in told else None  # type: ignore[assignment]
    if told.get("loading"):
        harness.engine.info = None
    harness.engine.answers.clear()
    if {"say", "thoughts", "fail", "raise", "pause"} & set(told):
        harness.engine.answers.append(_script(told))


_TODAY = re.compile(r"(Current date: |The current date is )\d{4}-\d{2}-\d{2}")
"""What templates write of the day."""


def _asked(harness: Harness, *, seeded: bool) -> Answer:
    """What the step's request became for the engine: its prompt as text, and how it samples where that is not the
    default. A model answers to these, so a client would see them change."""
    request = harness.engine.requests.pop()
    tokenizer = harness.app.state.services.registry.entries()[0].tokenizer
    sampling = json.loads(json.dumps(asdict(request.sampling)))
    defaults = json.loads(json.dumps(asdict(SamplingParams(0))))
    changed = {name: value for name, value in sampling.items() if value != defaults[name]}
    changed |= {} if seeded else {"seed": "SEED"}
    prompt = _TODAY.sub(r"\1DATE", "".join(map(tokenizer.token_text, request.prompt)))
    return {"prompt": prompt, "candidates": request.candidates, **changed}


def _script(told: Mapping[str, Any]) -> Answering:
    """``thoughts`` with their markers, then ``say`` (a text, or one for each candidate), word by word, after a
    ``pause`` in seconds; the candidate ends with ``reason`` and ``message``, ``cached`` prompt tokens were read from
    the cache. ``fail`` is the kind of the error with which the request ends then, ``raise`` a bug."""

    def script(request: Request) -> Script:
        events: list[Event | Pause | Exception] = [Pause(told["pause"])] if "pause" in told else []
        sampled = thought = 0
        for candidate in range(request.candidates):
            say = told.get("say", "")
            text = say if isinstance(say, str) else say[candidate]
            tokens = {True: 0, False: 0}
            for piece, is_thought in [
                *((piece, True) for piece in _pieces(told.get("thoughts", ""))),
                *((piece, False) for piece in _pieces(text)),
            ]:
                ids = tuple(tiny_tokenizer().encode(piece).ids)
                tokens[is_thought] += len(ids)
                events.append(Delta(candidate, ids, piece, _logprobs(request, ids), is_thought))
            sampled, thought = sampled + sum(tokens.values()), thought + tokens[True]
            if "fail" not in told:
                reason = FinishReason(told.get("reason", "stop"))
                events.append(
                    CandidateFinished(candidate, reason, sum(tokens.values()), tokens[True], told.get("message", ""))
                )
        if "raise" in told:
            return [*events, ValueError(SECRET)]
        error = RequestError(ErrorKind(told["fail"]), told["message"]) if "fail" in told else None
        aborted = [CandidateFinished(i, FinishReason.ABORTED, 0) for i in range(request.candidates)] if error else []
        return [
            *events,
            *aborted,
            RequestFinished(len(request.prompt), told.get("cached", 0), sampled, error, thought),
        ]

    return script


def _pieces(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def _logprobs(request: Request, ids: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    wanted = request.sampling.logprobs
    if wanted is None:
        return ()
    return tuple(
        TokenLogprobs(-0.5, tuple(TopLogprob(token + place, -0.5 - place) for place in range(wanted))) for token in ids
    )


async def _sent(harness: Harness, step: Case, words: Words) -> httpx.Response:
    if "recorded" in step:
        return await _replayed(harness, json.loads(RECORDED.read_text("utf-8").splitlines()[step["recorded"]]), words)
    method, _, path = words.filled(step["send"]).partition(" ")
    headers = {name: words.filled(value) for name, value in (step.get("headers") or {}).items()}
    content: Any = None
    if "json" in step:
        headers = {"content-type": "application/json", **headers}
        content = words.filled(json.dumps(step["json"])).encode()
    elif "text" in step:
        content = words.filled(step["text"]).encode() * step.get("times", 1)
    elif "pieces" in step:
        content = _streamed(step["pieces"])
    return await harness.client.request(method, path, content=content, headers=headers)


async def _streamed(pieces: list[str]) -> AsyncIterator[bytes]:
    for piece in pieces:
        if piece == "STALL":
            await asyncio.Event().wait()
        yield piece.encode()


async def _replayed(harness: Harness, row: Case, words: Words) -> httpx.Response:
    """A recorded row as it was sent, but to the upload that this server began."""
    dropped = {"content-length", "connection", "accept-encoding"}
    headers = {name: value for name, value in row["headers"].items() if name.lower() not in dropped}
    body = row["body"]
    content = b"" if body is None else json.dumps(body).encode()
    if body is not None and "__raw_len" in body:
        prefix = base64.b64decode(body["__raw_b64_prefix"])
        content = prefix + prefix[-1:] * (body["__raw_len"] - len(prefix))
    path = words.filled(row["path"].replace("upload_id=U1", "upload_id=UPLOAD-1"))
    return await harness.client.request(row["method"], path, content=content, headers=headers)


def _told(response: httpx.Response, words: Words) -> Answer:
    """The answer as it is kept: a body that is compact JSON as what it holds, every other one as it came."""
    text = words.masked(response.content.decode("utf-8", "backslashreplace"))
    headers: dict[str, str] = {}
    for name, value in response.headers.multi_items():
        if name == "x-request-id":
            value = "REQUEST"
        if name != "content-length" or int(value) != len(response.content):
            headers[name] = ", ".join(filter(None, (headers.get(name), words.masked(value))))
    text = _FILLERS.sub(r"\1 ", text)
    if "version=0.0.4" in headers.get("content-type", ""):
        text = _SAMPLE.sub(r"\1 NUMBER", text).replace(castor_version(), "VERSION")
    answer: Answer = {"status": response.status_code, "headers": headers}
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict | list) and json.dumps(value, separators=(",", ":")) == text:
            return {**answer, "json": value}
    return {**answer, "text": text}


async def _raw(harness: Harness, sent: str, words: Words) -> Answer:
    """What a listening server says to these bytes until it closes the connection; the request asks for that."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn_config(harness.app, harness.app.state.services.settings)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve([listener]))
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent.encode("latin-1"))
            data = bytearray()
            with suppress(ConnectionResetError):  # it does not read what it refuses
                while piece := await reader.read(2**16):
                    data += piece
            writer.close()
    finally:
        server.should_exit = True
        await running
    text = _DATE.sub("date: DATE", data.decode("latin-1").replace("\r\n", "\n"))
    return {"text": words.masked(re.sub(r"(?<=x-request-id: )\w+", "REQUEST", text))}


# --- The command -----------------------------------------------------------------------------------------------------


def _ran(steps: list[Case], folder: Path) -> list[Answer]:
    """What ``castor`` says in an empty folder: exit code and both streams. ``files`` are written before, ``builtin``
    makes a folder where the weights of the built-in model would be, ``environment`` is added to a clean one."""
    home = folder.resolve()
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "COLUMNS": "110"}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    calls = []
    for index, step in enumerate(steps):
        here = home / str(index)
        here.mkdir()
        for name, text in (step.get("files") or {}).items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_text(text, "utf-8")
        if step.get("builtin"):
            spec = load_specs(ROOT / "models.yaml")[0]
            (here / "cache" / "models" / _key(parse_source(spec.source), spec.sha256)).mkdir(parents=True)
        added = {name: text.replace("FOLDER", str(here)) for name, text in (step.get("environment") or {}).items()}
        calls.append({"run": step["run"], "environment": clean | added, "folder": str(here)})
    done = subprocess.run(
        [sys.executable, "-c", "from support.commands import main; main()"],
        env=clean,
        input=json.dumps(calls),
        stdout=subprocess.PIPE,
        text=True,
        timeout=COMMAND_SECONDS,
        check=True,
    )
    told = zip(json.loads(done.stdout), calls, strict=True)
    return [
        {"exit": answer["exit"], **{name: _shown(answer[name], call["folder"]) for name in ("stdout", "stderr")}}
        for answer, call in told
    ]


def _shown(text: str, folder: str) -> str:
    text = text.replace(folder, "FOLDER").replace(str(ROOT), "ROOT").replace(castor_version(), "VERSION")
    return "".join(line.rstrip() + "\n" for line in _HASH.sub("HASH", text).splitlines())


if __name__ == "__main__":
    write(*sys.argv[1:])
