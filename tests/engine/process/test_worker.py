"""The engine process, driven over its own socket by a hand-written parent."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import msgspec
import pytest
import zmq
from support.digests import ScriptedSampler, ids, make_core, make_request, model_info
from support.scripted_worker import COMMAND, REFUSAL, Kind

from engine.api.engine import EngineConfig
from engine.api.events import Delta, ErrorKind, Event, FinishReason, RequestFinished
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.process.messages import (
    EXIT_FAILED,
    EXIT_REFUSED,
    Cancel,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Refused,
    StepEvents,
    Stop,
    ToWorker,
    pack,
    submit,
    unpack_from_worker,
)
from engine.process.worker import serve

PATIENCE = 60


class Parent:
    """Starts a worker and speaks its protocol synchronously."""

    def __init__(self, folder: Path, path: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 0
        address = f"ipc://{folder}/s"
        self._socket.bind(address)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen([*COMMAND, address], stdin=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None
        self.stdin = self.process.stdin
        self.stdin.write(msgspec.json.encode(EngineConfig(path)) + b"\n")
        self.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.stdin.close()
        self._socket.close()
        self._context.term()

    def send(self, message: ToWorker | bytes) -> None:
        self._socket.send(message if isinstance(message, bytes) else pack(message))

    def receive(self) -> FromWorker:
        assert self._socket.poll(PATIENCE * 1000), "the worker says nothing"
        return unpack_from_worker(self._socket.recv())

    def load(self) -> None:
        while not isinstance(self.receive(), Ready):
            pass

    def events_of(self, request_id: str) -> Iterator[Event]:
        """Everything about one request, to its end."""
        while True:
            message = self.receive()
            assert isinstance(message, StepEvents)
            for told in message.events:
                if told.request_id == request_id:
                    yield from told
                    if told.done:
                        return

    def outcome(self, request: Request) -> list[Event]:
        self.send(submit(request))
        return list(self.events_of(request.id))


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # short: addresses of sockets end after about 100 characters


def request(request_id: str, kind: Kind = Kind.STEADY, tokens: int = 3) -> Request:
    return Request(request_id, (kind, 5, 6), SamplingParams(max_tokens=tokens))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_loading_is_told_then_events_in_order(folder: Path) -> None:
    with Parent(folder, "") as parent:
        assert [parent.receive(), parent.receive()] == [Loading("starting", 0.0), Loading("weights", 0.5)]
        ready = parent.receive()
        assert isinstance(ready, Ready)
        assert ready.info.model_type == "scripted"
        events = parent.outcome(request("a"))
        assert [event.token_ids for event in events if isinstance(event, Delta)] == [(0,), (1,), (2,)]
        assert events[-1] == RequestFinished(3, 0, 3)


def test_one_message_a_step_carries_all_requests(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        for name in "abc":
            parent.send(submit(request(name, tokens=10**6)))
        for step in itertools.count(1):
            message = parent.receive()
            assert isinstance(message, StepEvents)
            assert message.stats.steps == step
            if {told.request_id for told in message.events} == {"a", "b", "c"}:
                break


def test_a_cancelled_request_ends_once(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.send(submit(request("a", tokens=10**6)))
        parent.receive()
        parent.send(Cancel("a"))
        parent.send(Cancel("unknown"))
        *_, finished, done = parent.events_of("a")
        assert getattr(finished, "reason", None) is FinishReason.ABORTED
        assert isinstance(done, RequestFinished)
        assert done.error is not None
        assert done.error.kind is ErrorKind.CANCELLED


def test_broken_messages_harm_nobody(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        for nonsense in (b"", b"\xc1", b"\x93\x01", pack({"type": "Explode"}), random.Random(0).randbytes(100)):
            parent.send(nonsense)
        (done,) = parent.outcome(Request("broken", ("one",), SamplingParams(max_tokens=1)))  # type: ignore[arg-type]
        assert isinstance(done, RequestFinished)
        assert done.error is not None
        assert done.error.kind is ErrorKind.REFUSED
        assert "prompt" in done.error.message
        assert parent.outcome(request("after"))[-1] == RequestFinished(3, 0, 3)


def test_a_refused_model_is_told_with_its_exit_code(folder: Path) -> None:
    with Parent(folder, "refuse") as parent:
        messages = [parent.receive() for _ in range(3)]
        assert messages[-1] == Refused(REFUSAL)
        assert parent.process.wait(PATIENCE) == EXIT_REFUSED


def test_a_panic_while_loading_refuses_the_model(folder: Path) -> None:
    with Parent(folder, "panic") as parent:
        messages = [parent.receive() for _ in range(3)]
        assert messages[-1] == Refused("loading it failed (Panic: index out of bounds); the log has the trace")
        assert parent.process.wait(PATIENCE) == EXIT_REFUSED


def test_last_words_when_a_step_panics(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.send(submit(request("a", Kind.PANICS)))
        assert parent.receive() == Failed("Panic: device fault")
        assert parent.process.wait(PATIENCE) == EXIT_FAILED


def test_last_words_when_loading_fails(folder: Path) -> None:
    with Parent(folder, "crash") as parent:
        messages = [parent.receive() for _ in range(3)]
        assert messages[-1] == Failed("OSError: no space left on device")
        assert parent.process.wait(PATIENCE) == EXIT_FAILED


def test_last_words_when_a_step_fails(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.send(submit(request("a", Kind.RAISES)))
        assert parent.receive() == Failed("RuntimeError: device fault")
        assert parent.process.wait(PATIENCE) == EXIT_FAILED


def test_stop_ends_it_amid_work(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.send(submit(request("a", tokens=10**6)))
        parent.receive()
        parent.send(Stop())
        assert parent.process.wait(PATIENCE) == 0


def test_signals_meant_for_the_group_are_ignored(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.process.send_signal(signal.SIGINT)
        parent.process.send_signal(signal.SIGTERM)
        assert parent.outcome(request("a"))[-1] == RequestFinished(3, 0, 3)


@pytest.mark.parametrize("path", ["", "slow"])
def test_it_ends_with_the_parents_end_of_the_pipe(folder: Path, path: str) -> None:
    with Parent(folder, path) as parent:
        parent.receive()
        parent.receive()
        parent.stdin.close()
        assert parent.process.wait(PATIENCE) == EXIT_FAILED


@pytest.mark.skipif(sys.platform != "linux", reason="reads CPU times from /proc")
def test_an_idle_process_sleeps(folder: Path) -> None:
    with Parent(folder, "") as parent:
        parent.load()
        parent.outcome(request("a"))
        before = cpu_seconds(parent.process.pid)
        time.sleep(1)
        assert cpu_seconds(parent.process.pid) - before < 0.1


class Drops:
    """A border that hands over one request, waits for its end and keeps what is sent."""

    def __init__(self, request: Request) -> None:
        self.sent: list[StepEvents] = []
        self._request = request

    def send(self, message: FromWorker) -> None:
        assert isinstance(message, StepEvents)
        self.sent.append(message)

    def wait(self) -> None:
        """Something is always there."""

    def receive(self) -> list[ToWorker]:
        if not self.sent:
            return [submit(self._request)]
        ended = any(events.done for step in self.sent for events in step.events)
        return [Stop()] if ended else []


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_on_a_gpu_texts_go_out_while_the_next_step_is_computed(device: str) -> None:
    core, runner = make_core(ScriptedSampler(ids("Paris")), info=replace(model_info(), device=device))
    border = Drops(make_request(max_tokens=50))
    sent_before_forward: list[int] = []
    runner.refuse = lambda _: sent_before_forward.append(len(border.sent))
    serve(core, border)  # type: ignore[arg-type]
    events = [event for step in border.sent for batch in step.events for event in batch]
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "Paris"
    assert isinstance(events[-1], RequestFinished)
    texts = [sum(isinstance(e, Delta) for batch in step.events for e in batch) for step in border.sent]
    # On a CPU each step's message holds its token; on a GPU the token's message comes before that of the next step.
    assert max(texts) == 1
    assert (len(border.sent) > len(sent_before_forward) + 1) == (device != "cpu")
