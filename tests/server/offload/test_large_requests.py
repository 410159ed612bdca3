"""Large requests: one at a time, in a thread, and no place is free before its thread is done."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support.waiting import PATIENCE

from server.offload.large_requests import LargeRequests


async def test_work_is_done_in_a_thread_and_its_failure_is_raised() -> None:
    large = LargeRequests()
    assert await large.run("a", threading.get_ident) != threading.get_ident()
    with pytest.raises(KeyError):
        await large.run("a", lambda: {}["missing"])


async def test_a_place_is_free_only_when_its_thread_is_done() -> None:
    large = LargeRequests()
    began, leave = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert leave.wait(PATIENCE)

    first = asyncio.create_task(large.run("a", work))
    assert await asyncio.to_thread(began.wait, PATIENCE)
    first.cancel()
    second = asyncio.create_task(large.run("b", lambda: leave.is_set()))
    await asyncio.sleep(0)
    assert not first.done()
    leave.set()
    assert await asyncio.wait_for(second, PATIENCE), "the second one came after the first one's thread"
    with pytest.raises(asyncio.CancelledError):
        await first
