"""Child processes: what comes back, what ends them, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import child_jobs as jobs

from server.errors import InvalidArgument, ResourceExhausted
from server.offload import children as children_module
from server.offload.children import ChildDied, ChildProcesses, JobFailed, TookTooLong, TookTooMuch

SECONDS = 60.0
MEMORY = 256 * 1024**2


@pytest.fixture
async def children() -> AsyncIterator[ChildProcesses]:
    made = ChildProcesses(1, MEMORY, "busy")
    yield made
    await made.close()


async def run(children: ChildProcesses, *job: Any, owner: str = "", seconds: float = SECONDS) -> Any:
    return await children.run(*job, owner=owner, seconds=seconds, patience=SECONDS)


async def test_results_come_back_and_the_process_stays(children: ChildProcesses) -> None:
    value = {"a": [1, -(2**63), 2.5, None, True, "é\ud7ff"], "b": b"bytes"}
    assert await run(children, jobs.echo, value) == value
    assert await run(children, jobs.echo, "x" * 5_000_000) == "x" * 5_000_000
    assert await run(children, jobs.process) == await run(children, jobs.process)


async def test_a_refusal_of_the_job_is_its_refusal(children: ChildProcesses) -> None:
    before = await run(children, jobs.process)
    with pytest.raises(InvalidArgument) as caught:
        await run(children, jobs.refusing)
    assert [tuple(violation) for violation in caught.value.violations] == [("a.b", "a.b: is wrong")]
    with pytest.raises(JobFailed, match="ZeroDivisionError"):
        await run(children, jobs.failing)
    assert await run(children, jobs.process) == before


async def test_what_takes_too_long_is_killed(children: ChildProcesses) -> None:
    pid = await run(children, jobs.process)
    with pytest.raises(TookTooLong):
        await run(children, jobs.sleeping, seconds=0.2)
    assert not jobs.is_running(pid)
    assert await run(children, jobs.echo, 1) == 1


async def test_what_takes_too_much_memory_ends(children: ChildProcesses) -> None:
    assert await run(children, jobs.greedy, MEMORY // 4) == MEMORY // 4
    with pytest.raises(TookTooMuch):
        await run(children, jobs.greedy, MEMORY)
    assert await run(children, jobs.echo, 1) == 1


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGABRT, TookTooMuch), (signal.SIGSEGV, TookTooMuch), (signal.SIGXCPU, TookTooLong), (9, ChildDied)],
)
async def test_how_it_died_tells_whose_fault_it_was(children: ChildProcesses, number: int, kind: type) -> None:
    with pytest.raises(kind):
        await run(children, jobs.dying, int(number))
    assert await run(children, jobs.echo, 1) == 1


async def test_who_goes_away_has_the_process_killed(children: ChildProcesses) -> None:
    pid = await run(children, jobs.process)
    working = asyncio.create_task(run(children, jobs.sleeping))
    await asyncio.sleep(0.1)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert not jobs.is_running(pid)
    assert await run(children, jobs.echo, 1) == 1


async def test_what_libraries_print_is_no_answer(children: ChildProcesses) -> None:
    assert await run(children, jobs.printing) == "the answer"


async def test_it_has_none_of_our_environment(children: ChildProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTOR_API_KEYS", "secret")
    assert "secret" not in str(await run(children, jobs.environment))


async def test_nobody_waits_for_longer_than_asked(children: ChildProcesses) -> None:
    holding = asyncio.create_task(run(children, jobs.sleeping))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="busy"):
        await children.run(jobs.echo, 1, owner="b", seconds=SECONDS, patience=0.05)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def test_it_ends_when_nothing_comes_and_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children_module, "IDLE_SECONDS", 0.05)
    children = ChildProcesses(1, MEMORY, "busy")
    pid = await run(children, jobs.process)
    async with asyncio.timeout(SECONDS):
        while jobs.is_running(pid):
            await asyncio.sleep(0.02)
    monkeypatch.undo()
    pid = await run(children, jobs.process)
    await children.close()
    assert not jobs.is_running(pid)


async def test_one_that_was_ended_while_it_rested_is_replaced(children: ChildProcesses) -> None:
    pid = await run(children, jobs.process)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        while children._idle[0].is_running:
            await asyncio.sleep(0.02)
    assert await run(children, jobs.process) != pid
