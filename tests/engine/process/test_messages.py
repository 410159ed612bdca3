"""Every value of the engine's border survives the way through msgpack unchanged, types included."""

from __future__ import annotations

import msgspec
import pytest

from engine.api.block_groups import BlockGroup, Window
from engine.api.engine import EngineConfig, EngineStats, ModelInfo
from engine.api.events import (
    CandidateFinished,
    Delta,
    ErrorKind,
    FinishReason,
    RequestError,
    RequestEvents,
    RequestFinished,
    TokenLogprobs,
    TopLogprob,
)
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.process import messages
from engine.process.messages import (
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
)

SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    seed=2**64 - 1,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    stop=("\n\n", "ключ", "🙂"),
    stop_ids=(2, 3),
    logprobs=20,
)
REQUEST = Request("r1", (1, 2, 3), SAMPLING, candidates=3, salt="tenant", deadline=1234.5)
LOGPROBS = (TokenLogprobs(-0.0625, (TopLogprob(5, -0.0625), TopLogprob(9, -3.5))), TokenLogprobs(-1.0))
EVENTS = RequestEvents(
    "r1",
    (Delta(0, (5, 6), "né", LOGPROBS), Delta(1, (), "tail")),
    (CandidateFinished(0, FinishReason.STOP, 2), CandidateFinished(2, FinishReason.ABORTED, 0)),
    RequestFinished(3, 2, 2, RequestError(ErrorKind.DEADLINE, "too late")),
)
STATS = EngineStats(1, 2, 3, 4, 5, 6, 7)
INFO = ModelInfo(
    "llama", 10**12, "bfloat16", "cuda:0", 49152, 8192, 16, (BlockGroup(4096), BlockGroup(512, Window(128))), 64, (2, 7)
)


@pytest.mark.parametrize("message", [Cancel("r1"), Stop()])
def test_messages_to_the_worker(message: ToWorker) -> None:
    assert messages.unpack_to_worker(pack(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Loading("weights", 0.25),
        Ready(INFO),
        Refused("layer 3"),
        Failed("RuntimeError: out"),
        StepEvents([EVENTS, RequestEvents("r2")], STATS),
    ],
)
def test_messages_from_the_worker(message: FromWorker) -> None:
    assert messages.unpack_from_worker(pack(message)) == message


@pytest.mark.parametrize("request_", [REQUEST, Request("r2", (0,), SamplingParams(max_tokens=1))])
def test_a_request_arrives_as_it_was(request_: Request) -> None:
    arrived = messages.unpack_to_worker(pack(messages.submit(request_)))
    assert isinstance(arrived, messages.Submit)
    assert messages.unpack_request(arrived) == request_


def test_events_come_back_as_the_types_they_were() -> None:
    arrived = messages.unpack_from_worker(pack(StepEvents([EVENTS], STATS)))
    assert isinstance(arrived, StepEvents)
    (told,) = arrived.events
    assert type(told.deltas[0].logprobs[0].top[0]) is TopLogprob
    assert type(told.finished[0].reason) is FinishReason
    assert told.done is not None
    assert told.done.error is not None
    assert type(told.done.error.kind) is ErrorKind
    assert list(told) == list(EVENTS)


def test_the_config_survives_json() -> None:
    config = EngineConfig("/models/ü", max_context=4096, kv_memory=0.85, threads=2)
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [(SamplingParams(1, seed=2**64), "64 bits"), (SamplingParams(1, stop=("\ud800",)), "surrogates")],
)
def test_values_that_msgpack_cannot_carry_are_told(sampling: SamplingParams, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        messages.submit(Request("r1", (1,), sampling))


def test_a_request_of_wrong_types_still_has_its_id() -> None:
    broken = Request("r1", ("one",), SAMPLING)  # type: ignore[arg-type]
    arrived = messages.unpack_to_worker(pack(messages.submit(broken)))
    assert isinstance(arrived, messages.Submit)
    assert arrived.request_id == "r1"
    with pytest.raises(msgspec.ValidationError, match=r"prompt\[0\]"):
        messages.unpack_request(arrived)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", pack({"type": "Explode"}), pack({"type": "Cancel"})])
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        messages.unpack_to_worker(data)
    with pytest.raises(msgspec.MsgspecError):
        messages.unpack_from_worker(data)
