"""What is in flight: launched, then finished, also when a chunk of it cannot be computed."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from support.digests import TOKENIZER, DigestRunner, DigestSampler, make_request, model_info

from engine.api.errors import EngineUnavailable, OutOfMemory
from engine.api.events import ErrorKind, FinishReason, RequestError
from engine.cache.block_pool import BlockPool
from engine.core.executor import Executor
from engine.core.output import Output
from engine.core.request_state import RequestState
from engine.scheduling.chunk_budget import CostOverDecodes, StepPacer
from engine.scheduling.contracts import Sampled
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.scheduling.sequence_memory import SequenceMemory


class Loop:
    """The parts of a core around an executor, with requests of three tokens that all fit into one batch."""

    def __init__(self, names: Iterable[str]) -> None:
        info = model_info()
        pacer = StepPacer(1e9, CostOverDecodes())
        self.runner = DigestRunner(info)
        self.scheduler = Scheduler(
            SequenceMemory([BlockPool(info.groups[0].num_blocks, info.block_size)]), pacer, info.max_running
        )
        self.requests: dict[str, RequestState] = {}
        self.output = Output(self.requests, self.scheduler, TOKENIZER, info)
        self.failed: list[str] = []
        self.executor = Executor(
            self.runner, DigestSampler(), pacer, lambda: self.runner.seconds, self.requests, self._fail
        )
        for number, name in enumerate(names):
            state = self.requests[name] = self.output.open(make_request(name, (5, 6, 7 + number)))
            state.is_enqueued = True
            self.scheduler.add(list(state.open))
        self.batch = self.scheduler.schedule()

    def compute(self, batch: list[ScheduledChunk]) -> dict[str, int]:
        return tokens(self.executor.finish(self.executor.launch(batch)))

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        self.failed.append(sequence.request.id)
        self.output.fail(sequence, error)


def tokens(computed: list[tuple[ScheduledChunk, Sampled | None]]) -> dict[str, int]:
    return {chunk.sequence.request.id: sampled.token_id for chunk, sampled in computed if sampled is not None}


def refuse(runner: DigestRunner, name: str) -> None:
    def refuse_one(batch: list[ScheduledChunk]) -> None:
        if any(chunk.sequence.request.id == name for chunk in batch):
            raise RuntimeError("no")

    runner.refuse = refuse_one


def test_several_batches_may_be_in_flight() -> None:
    loop = Loop("abc")
    in_flight = [loop.executor.launch([chunk]) for chunk in loop.batch]
    assert len(loop.runner.batches) == 3
    found = [tokens(loop.executor.finish(one)) for one in in_flight]
    together = Loop("abc")
    assert {name: token for one in found for name, token in one.items()} == together.compute(together.batch)


def test_a_batch_that_fails_is_finished_chunk_by_chunk() -> None:
    expected = Loop("abc")
    loop = Loop("abc")
    refuse(loop.runner, "b")
    in_flight = loop.executor.launch(loop.batch)
    assert (in_flight.failed, loop.failed) == (True, [])
    found = tokens(loop.executor.finish(in_flight))
    assert loop.failed == ["b"]
    assert found == {name: token for name, token in expected.compute(expected.batch).items() if name != "b"}


def test_what_ends_in_flight_is_not_computed_again() -> None:
    loop = Loop("abc")
    refuse(loop.runner, "b")
    in_flight = loop.executor.launch(loop.batch)
    for name in "ab":
        loop.output.fail(loop.requests[name].first, RuntimeError("meanwhile"))
    assert set(tokens(loop.executor.finish(in_flight))) == {"c"}
    assert [len(batch) for batch in loop.runner.batches] == [3, 1]
    assert [finished.reason for finished in loop.requests["b"].finished] == [FinishReason.ABORTED]


def test_a_lost_device_ends_the_launch() -> None:
    loop = Loop("a")

    def be_lost() -> None:
        raise EngineUnavailable("lost")

    refuse(loop.runner, "a")
    loop.runner.check = be_lost
    with pytest.raises(EngineUnavailable, match="lost"):
        loop.executor.launch(loop.batch)
    assert loop.failed == []


def test_memory_that_ran_out_is_named_to_the_one_request_that_does_not_fit() -> None:
    loop = Loop("abc")
    refuse(loop.runner, "b")
    loop.runner.shortage = lambda error: OutOfMemory(f"Memory ran out ({error}).")
    assert set(loop.compute(loop.batch)) == {"a", "c"}
    done = loop.requests["b"].done
    assert done is not None
    assert done.error == RequestError(ErrorKind.INTERNAL, "Memory ran out (no).")
    assert (loop.requests["a"].done, loop.requests["c"].done) == (None, None)
