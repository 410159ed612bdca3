"""Every way in which an engine process can end, and how it is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.processes import (
    ENDLESS,
    PATIENCE,
    assert_failed,
    engine,
    is_alive,
    pid_of,
    read,
    ready_engine,
    request,
    until,
)
from support.scripted_worker import COMMAND, REFUSAL, Kind

from engine.api.engine import EngineConfig, EngineState
from engine.api.errors import EngineUnavailable
from engine.api.events import CandidateFinished, FinishReason, RequestFinished
from engine.process.client import ProcessEngine
from engine.process.messages import EXIT_FAILED, Failed, pack
from engine.process.supervisor import RestartPolicy, WorkerProcess, socket_folder

pytestmark = pytest.mark.usefixtures("nothing_is_left")


STALL = 4
"""Seconds without progress: long enough for a process that shares its core with several others."""


async def test_kill_9_amid_32_streams_gives_32_errors_and_the_service_comes_back() -> None:
    async with ready_engine() as process_engine:
        streams = [process_engine.submit(request(str(n), ENDLESS, candidates=1 + n % 3)) for n in range(32)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await until(lambda: process_engine.health().stats.steps > 20)
        os.kill(pid_of(process_engine), signal.SIGKILL)
        for n, events in enumerate(await asyncio.gather(*readers)):
            assert_failed(events, candidates=1 + n % 3)
        with pytest.raises(EngineUnavailable, match="SIGKILL"):
            process_engine.submit(request("too early"))
        assert process_engine.describe().model_type == "scripted"
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().restarts == 1
        assert (await read(process_engine.submit(request("0"))))[-1] == RequestFinished(2, 0, 3)


async def test_what_was_once_ready_is_never_given_up() -> None:
    async with ready_engine() as process_engine:
        for kills in range(1, 4):
            os.kill(pid_of(process_engine), signal.SIGKILL)
            await until(lambda kills=kills: process_engine.health().restarts == kills)  # type: ignore[misc]
            await asyncio.wait_for(process_engine.ready(), PATIENCE)


async def test_candidates_that_had_finished_are_not_aborted_again() -> None:
    async with ready_engine() as process_engine:
        stream = process_engine.submit(request("a", ENDLESS, kind=Kind.UNEVEN, candidates=3))
        await until(lambda: process_engine.health().stats.steps > 5)
        os.kill(pid_of(process_engine), signal.SIGKILL)
        events = await read(stream)
        finished = {e.candidate: e for e in events if isinstance(e, CandidateFinished)}
        assert finished.pop(0) == CandidateFinished(0, FinishReason.STOP, 1)
        assert {e.reason for e in finished.values()} == {FinishReason.ABORTED}
        assert list(finished) == [1, 2]
        done = events[-1]
        assert isinstance(done, RequestFinished)
        assert done.candidate_tokens == 1 + sum(e.tokens for e in finished.values())


async def test_the_reason_of_a_death_stands_in_the_log_and_not_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    async with ready_engine() as process_engine:
        events = await read(process_engine.submit(request("a", kind=Kind.RAISES)))
        assert_failed(events)
        assert "device fault" not in str(events[-1])
        await until(lambda: "RuntimeError: device fault" in caplog.text)
        assert "second line" not in caplog.text
        await asyncio.wait_for(process_engine.ready(), PATIENCE)


class EndedProcess:
    """A process that has failed and has said why, to a socket that was slow to hear it."""

    pid, returncode = 0, EXIT_FAILED

    async def wait(self) -> int:
        return self.returncode

    async def recv(self) -> bytes:
        await asyncio.sleep(0.5)
        return pack(Failed("device fault"))


async def test_last_words_are_waited_for() -> None:
    ended = EndedProcess()
    worker = WorkerProcess(ended, ended, "")  # type: ignore[arg-type]
    assert await anext(worker.messages()) == Failed("device fault")


class ChattyProcess:
    """A process that runs and has sent ``number`` messages."""

    pid, returncode = 0, None

    def __init__(self, number: int) -> None:
        self._number = number

    async def wait(self) -> int:
        return await asyncio.get_running_loop().create_future()

    def recv(self) -> asyncio.Future[bytes]:
        arrival: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._number -= 1
        if self._number >= 0:
            arrival.set_result(pack(Failed(str(self._number))))
        return arrival


async def test_messages_that_have_come_follow_at_once_and_others_get_their_turns() -> None:
    turns: list[int] = []
    chatty = ChattyProcess(100)
    worker = WorkerProcess(chatty, chatty, "")  # type: ignore[arg-type]
    others = asyncio.create_task(_count(turns))
    messages = worker.messages()
    for number in reversed(range(100)):
        assert await anext(messages) == Failed(str(number))
    assert 1 <= len(turns) <= 100 // 16 + 1
    others.cancel()
    worker._exited.cancel()


async def _count(turns: list[int]) -> None:
    while True:
        turns.append(1)
        await asyncio.sleep(0)


async def test_a_process_that_makes_no_progress_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with ready_engine(stall=STALL) as process_engine:
        await read(process_engine.submit(request("before")))
        await asyncio.sleep(STALL + 1)  # idle, which is no reason
        assert process_engine.health().state is EngineState.READY
        events = await read(process_engine.submit(request("a", kind=Kind.HANGS)))
        assert_failed(events)
        await until(lambda: f"no progress for {STALL} s" in caplog.text)
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().restarts == 1


async def test_steps_that_take_their_time_are_progress() -> None:
    async with ready_engine(stall=STALL) as process_engine:
        events = await read(process_engine.submit(request("a", 20, kind=Kind.SLOW)))  # four steps a second
        assert events[-1] == RequestFinished(2, 0, 20)


async def test_killed_while_loading_it_loads_again(tmp_path: Path) -> None:
    async with engine(f"once:{tmp_path / 'marker'}") as process_engine:
        await until(lambda: process_engine._worker is not None and (tmp_path / "marker").exists())
        os.kill(pid_of(process_engine), signal.SIGKILL)
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().restarts == 1


async def test_a_load_that_makes_no_progress_is_given_up() -> None:
    async with engine("slow", load_stall=STALL) as process_engine:
        await until(lambda: process_engine.health().progress == 0.5)
        pid = pid_of(process_engine)
        sentence = r"its loading \(weights, 50%\) made no progress for 4 s and was ended"
        with pytest.raises(EngineUnavailable, match=sentence):
            await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().state is EngineState.FAILED
        assert process_engine.health().restarts == 0
        assert not is_alive(pid)


async def test_a_load_that_never_says_a_word_is_given_up() -> None:
    silent = (sys.executable, "-c", "import time; time.sleep(3600)")
    process_engine = ProcessEngine(EngineConfig(""), load_stall_seconds=1, command=silent)
    process_engine.start()
    with pytest.raises(EngineUnavailable, match="made no progress for 1 s"):
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
    await process_engine.close()


async def test_a_long_load_with_progress_is_waited_for() -> None:
    async with engine(f"steps:{4 * STALL}", load_stall=STALL) as process_engine:
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        await asyncio.sleep(STALL + 1)  # what is loaded is not watched as what loads
        assert process_engine.health().state is EngineState.READY


async def test_a_refused_model_fails_for_good_with_the_reason() -> None:
    async with engine("refuse") as process_engine:
        with pytest.raises(EngineUnavailable, match="MambaMixer"):
            await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().state is EngineState.FAILED
        assert process_engine.health().detail == REFUSAL
        assert process_engine.health().restarts == 0
        with pytest.raises(EngineUnavailable, match="MambaMixer"):
            process_engine.submit(request("a"))


async def test_a_device_that_does_not_come_back_is_waited_for_and_said_to_be_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "devices"
    async with engine(f"served:{log}") as process_engine:
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        os.kill(pid_of(process_engine), signal.SIGKILL)
        gone = "its process was refused (device 'cuda:0' is not available), 3 deaths in a row, and is started again"
        await until(lambda: gone in process_engine.health().detail)
        assert process_engine.health().state is EngineState.LOADING
        await until(lambda: process_engine.health().detail == f"weights; {gone}")
        with pytest.raises(EngineUnavailable, match=r"is loading \(weights; .*'cuda:0' is not available.*again soon"):
            process_engine.submit(request("a"))
        assert "3 deaths in a row; starting it again in 2 s" in caplog.text
        log.with_suffix(".back").touch()
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().detail == ""
        assert (await read(process_engine.submit(request("a"))))[-1] == RequestFinished(2, 0, 3)
    first, *later = log.read_text().split()
    assert first == "auto"
    assert set(later) == {"cpu"}, "where it was served, and not what else there is"


async def test_a_model_that_never_loads_is_given_up() -> None:
    async with engine("crash") as process_engine:
        with pytest.raises(EngineUnavailable, match=r"OSError: no space left on device.*several times"):
            await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().restarts == 2


async def test_what_would_fail_again_is_tried_once() -> None:
    async with engine("broken") as process_engine:
        with pytest.raises(EngineUnavailable, match=r"loading it failed \(KeyError: 'vocab'\); the log has the trace"):
            await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert process_engine.health().restarts == 0


async def test_a_long_folder_for_temporary_files_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    async with ready_engine() as process_engine:
        assert (await read(process_engine.submit(request("a"))))[-1] == RequestFinished(2, 0, 3)
        assert list(long.iterdir()) == []


@pytest.mark.parametrize("spare", [0, 1])
def test_the_longest_address_is_used(spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 107 bytes, 16 are the folder's own name and 7 that of the socket."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    rest = 107 - len(f"{short}/") - len("/castor-12345678/engine") + spare
    folder = short / ("x" * rest)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    made = Path(socket_folder())
    assert (made.parent == folder) == (spare == 0)
    assert made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    folder.rmdir()
    short.rmdir()


async def test_a_command_that_does_not_exist_is_told() -> None:
    process_engine = ProcessEngine(EngineConfig(""), command=("/nonexistent/python",))
    process_engine.start()
    with pytest.raises(EngineUnavailable, match=r"could not be started .*No such file"):
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
    await process_engine.close()


async def test_a_process_that_talks_nonsense_is_given_up() -> None:
    nonsense = "import sys, zmq; s = zmq.Context().socket(zmq.PAIR); s.connect(sys.argv[1]); s.send(b'?'); s.poll()"
    process_engine = ProcessEngine(EngineConfig(""), command=(sys.executable, "-c", nonsense))
    process_engine.start()
    with pytest.raises(EngineUnavailable, match="message that cannot be read"):
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
    await process_engine.close()


async def test_close_with_requests_in_flight() -> None:
    async with ready_engine() as process_engine:
        pid = pid_of(process_engine)
        streams = [process_engine.submit(request(str(n), ENDLESS)) for n in range(8)]
        await until(lambda: process_engine.health().stats.running == 8)
        await asyncio.wait_for(asyncio.gather(process_engine.close(), process_engine.close()), PATIENCE)
        assert not is_alive(pid)
        for stream in streams:
            events = await read(stream)
            assert_failed(events)
            assert "shutting down" in str(events[-1])
        assert process_engine.health().state is EngineState.STOPPED
        with pytest.raises(EngineUnavailable, match="shutting down"):
            process_engine.submit(request("late"))


async def test_close_ends_a_process_that_does_not_listen() -> None:
    process_engine = ProcessEngine(EngineConfig(""), stop_seconds=0.5, command=COMMAND)
    process_engine.start()
    await asyncio.wait_for(process_engine.ready(), PATIENCE)
    stream = process_engine.submit(request("a", kind=Kind.HANGS))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(process_engine.close(), PATIENCE)
    assert_failed(await read(stream))


@pytest.mark.parametrize("delay", [0, 0.001, 0.01, 0.05, 0.2, 0.5])
async def test_close_while_it_starts(delay: float) -> None:
    async with engine("slow") as process_engine:
        waiter = asyncio.create_task(process_engine.ready())
        await asyncio.sleep(delay)
        await asyncio.wait_for(process_engine.close(), PATIENCE)
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(waiter, PATIENCE)


@pytest.mark.parametrize("delay", [0, 0.01, 0.1, 0.3])
async def test_close_while_it_restarts(delay: float) -> None:
    async with ready_engine() as process_engine:
        os.kill(pid_of(process_engine), signal.SIGKILL)
        await asyncio.sleep(delay)


async def test_closed_it_can_be_started_again() -> None:
    async with ready_engine() as process_engine:
        await process_engine.close()
        process_engine.start()
        await asyncio.wait_for(process_engine.ready(), PATIENCE)
        assert (await read(process_engine.submit(request("a"))))[-1] == RequestFinished(2, 0, 3)


async def test_a_cancelled_supervisor_leaves_nothing_behind() -> None:
    async with ready_engine() as process_engine:
        pid = pid_of(process_engine)
        stream = process_engine.submit(request("a", ENDLESS))
        assert process_engine._task is not None
        process_engine._task.cancel()
        assert_failed(await read(stream))
        await until(lambda: not is_alive(pid))
        await until(lambda: process_engine.health().state is EngineState.FAILED)


PARENT = """
import asyncio, sys
from engine.process.client import ProcessEngine
from engine.api.engine import EngineConfig
from support.scripted_worker import COMMAND

async def main():
    engine = ProcessEngine(EngineConfig(sys.argv[1]), command=COMMAND)
    engine.start()
    while not engine.health().progress:
        await asyncio.sleep(0.01)
    print(engine._worker.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("", signal.SIGKILL),
        ("slow", signal.SIGKILL),
        ("", signal.SIGINT),
        ("slow", signal.SIGINT),
        ("slow", signal.SIGTERM),
    ],
)
async def test_the_process_ends_with_its_parent(path: str, end: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tempfile.tempdir)}
    with subprocess.Popen([sys.executable, "-c", PARENT, path], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        try:
            pid = int(await asyncio.to_thread(parent.stdout.readline))
            assert is_alive(pid)
            parent.send_signal(end)
            parent.wait(PATIENCE)
        finally:
            parent.kill()  # else leaving the block waits for it, whatever went wrong
    await until(lambda: not is_alive(pid))


def test_restarts_come_at_once_and_then_ever_later() -> None:
    policy = RestartPolicy()
    assert [policy.died(ready_seconds=1) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert policy.died(ready_seconds=None) == 30
    assert policy.died(ready_seconds=3600) == 0


def test_what_was_never_ready_is_given_up() -> None:
    policy = RestartPolicy()
    assert [policy.died(ready_seconds=None) for _ in range(3)] == [0, 1, None]
