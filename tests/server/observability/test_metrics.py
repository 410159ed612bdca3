"""The record of a request and the metrics that are made from it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from structlog.testing import capture_logs
from support.waiting import PATIENCE

from engine.api.engine import EngineState, EngineStats, Health
from engine.api.events import CandidateFinished, Delta, ErrorKind, FinishReason, RequestError, RequestFinished
from server.errors import ResourceExhausted
from server.observability import request_record
from server.observability.metrics import MAX_IGNORED_FIELDS, Metrics, Served
from server.observability.request_record import Crowd, RequestRecord


class Model:
    """A model with a fixed health."""

    def __init__(self, name: str, health: Health) -> None:
        self.name = name
        self._health = health

    def health(self) -> Health:
        return self._health


def metrics_of(*models: Served) -> Metrics:
    def served() -> Iterable[Served]:
        return models

    return Metrics(served, "1.2.3")


def record_in(metrics: Metrics) -> RequestRecord:
    return RequestRecord(metrics, "POST", "/v1beta/models/m:generateContent", "127.0.0.1")


def samples(metrics: Metrics) -> dict[str, float]:
    lines = metrics.exposition().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def answer(record: RequestRecord) -> None:
    record.resolved("m", "generateContent")
    record.observe(Delta(0, (), "held back"))
    record.observe(Delta(0, (1,), "a"))
    record.observe(Delta(1, (1,), "a"))
    record.observe(Delta(0, (2, 3), "bc"))
    record.observe(CandidateFinished(0, FinishReason.STOP, 3))
    record.observe(RequestFinished(7, 4, 4))


def test_a_request_is_counted_once_with_its_tokens() -> None:
    metrics = metrics_of()
    record = record_in(metrics)
    answer(record)
    record.status = 200
    record.close(Crowd())
    found = samples(metrics)
    assert found['castor_requests_total{code="200",method="generateContent",model="m"}'] == 1
    assert found['castor_prompt_tokens_total{model="m"}'] == 7
    assert found['castor_cached_tokens_total{model="m"}'] == 4
    assert found['castor_generated_tokens_total{model="m"}'] == 4
    assert found['castor_time_to_first_token_seconds_count{model="m"}'] == 1
    assert found['castor_inter_token_seconds_count{model="m"}'] == 1, "one gap: the candidates do not mix"
    assert found['castor_request_seconds_count{method="generateContent",model="m"}'] == 1
    assert found['castor_build_info{version="1.2.3"}'] == 1
    assert not any(name.startswith("castor_rejected_total") for name in found)


def test_the_log_line_tells_the_request_and_no_text() -> None:
    record = record_in(metrics_of())
    answer(record)
    record.status = 200
    record.ignored.append("labels")
    with capture_logs() as lines:
        record.close(Crowd())
    (line,) = lines
    assert (line["event"], line["status"], line["model"], line["method"]) == ("request", 200, "m", "generateContent")
    assert (line["prompt_tokens"], line["cached_tokens"], line["generated_tokens"]) == (7, 4, 4)
    assert line["ignored"] == ["labels"]
    assert line["ttft_s"] <= line["duration_s"]
    assert "held back" not in str(line)


def test_a_failure_in_the_middle_of_a_stream_is_the_code_that_counts() -> None:
    metrics = metrics_of()
    record = record_in(metrics)
    record.resolved("m", "streamGenerateContent")
    record.status = 200
    record.observe(Delta(0, (1,), "a"))
    record.observe(RequestFinished(7, 0, 1, RequestError(ErrorKind.UNAVAILABLE, "it died")))
    record.close(Crowd())
    assert samples(metrics)['castor_requests_total{code="503",method="streamGenerateContent",model="m"}'] == 1
    assert (record.status, record.error) == (503, "UNAVAILABLE")


@pytest.mark.parametrize(("reason", "label"), [("", "overloaded"), ("host", "host")])
async def test_what_was_turned_away_is_counted_by_reason(reason: str, label: str) -> None:
    metrics = metrics_of()
    record = record_in(metrics)
    record.resolved("m", "generateContent")
    record.rejection = reason
    record.failed(ResourceExhausted("full"))
    record.close(Crowd())
    assert samples(metrics)[f'castor_rejected_total{{reason="{label}"}}'] == 1


async def test_the_log_counts_a_crowd_that_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_record, "CROWD_SECONDS", 0.1)
    metrics, crowd = metrics_of(), Crowd()
    with capture_logs() as lines:
        for _ in range(2):
            for number in range(100):
                record = record_in(metrics)
                record.resolved(f"m{number % 3}", "generateContent")
                record.failed(ResourceExhausted("full"))
                record.close(crowd)
            async with asyncio.timeout(PATIENCE):
                while lines[-1]["event"] == "request":
                    await asyncio.sleep(0.01)
    assert [line["event"] for line in lines] == 2 * ["request", *3 * ["more requests turned away"]]
    assert {line["model"]: line["count"] for line in lines[1:4]} == {"m0": 33, "m1": 33, "m2": 33}
    assert samples(metrics)['castor_rejected_total{reason="overloaded"}'] == 200


async def test_each_file_that_is_too_much_for_its_owner_has_its_line() -> None:
    crowd = Crowd()
    with capture_logs() as lines:
        for _ in range(5):
            record = record_in(metrics_of())
            record.resolved("", "uploadFile")
            record.failed(ResourceExhausted("The files of this key take too much."))
            record.close(crowd)
    assert [line["event"] for line in lines] == 5 * ["request"]


def test_a_probe_that_hears_503_was_not_turned_away() -> None:
    metrics = metrics_of()
    record = RequestRecord(metrics, "GET", "/readyz", "127.0.0.1")
    record.status = 503
    with capture_logs() as lines:
        record.close(Crowd())
    assert not any(name.startswith("castor_rejected_total") for name in samples(metrics))
    assert lines[0]["log_level"] == "debug"


def test_a_stranger_cannot_grow_the_labels() -> None:
    metrics = metrics_of()
    for number in range(MAX_IGNORED_FIELDS + 20):
        record = record_in(metrics)
        record.http_method = record.path = f"invented-{number}"
        record.ignored.append(f"field-{number}")
        record.status = 404
        record.close(Crowd())
    found = samples(metrics)
    assert found['castor_ignored_fields_total{field="other"}'] == 20
    assert found['castor_requests_total{code="404",method="",model=""}'] == MAX_IGNORED_FIELDS + 20
    assert sum(name.startswith("castor_ignored_fields_total") for name in found) == MAX_IGNORED_FIELDS + 1


def test_engines_are_read_when_somebody_asks() -> None:
    blocks = {"used_blocks": 10, "cached_blocks": 5, "total_blocks": 64, "used_slots": 3, "snapshots": 7}
    counted = {"preemptions": 7, "steps": 99, "sampled_tokens": 300, "redrawn_tokens": 4}
    stats = EngineStats(running=3, waiting=2, **blocks, **counted)
    busy = Model("busy", Health(EngineState.READY, restarts=1, stats=stats))
    found = samples(metrics_of(busy, Model("idle", Health(EngineState.LOADING))))
    expected = {
        "castor_model_ready": 1,
        "castor_sequences_running": 3,
        "castor_sequences_waiting": 2,
        "castor_kv_blocks_used": 10,
        "castor_kv_blocks_cached": 5,
        "castor_state_slots_used": 3,
        "castor_state_snapshots": 7,
        "castor_kv_blocks_total": 64,
        "castor_preemptions_total": 7,
        "castor_engine_steps_total": 99,
        "castor_tokens_sampled_total": 300,
        "castor_tokens_redrawn_total": 4,
        "castor_engine_restarts_total": 1,
    }
    for name, value in expected.items():
        assert found[f'{name}{{model="busy"}}'] == value
        assert found[f'{name}{{model="idle"}}'] == 0


def test_two_servers_in_one_process_do_not_share_counters() -> None:
    first, second = metrics_of(), metrics_of()
    first.rejected.labels("host").inc()
    assert 'castor_rejected_total{reason="host"}' not in samples(second)


def test_ignored_fields_count_by_field_and_not_by_place() -> None:
    metrics = metrics_of()
    record = record_in(metrics)
    record.ignored += ["contents[0].parts[7].partMetadata", "contents[1].parts[0].partMetadata", "store"]
    record.ignored.append("generateContentRequest.store")
    record.close(Crowd())
    found = {name: value for name, value in samples(metrics).items() if name.startswith("castor_ignored_fields_total")}
    assert found == {
        'castor_ignored_fields_total{field="contents.parts.partMetadata"}': 1,
        'castor_ignored_fields_total{field="store"}': 1,
    }
