"""The pacer against simulated machines."""

from __future__ import annotations

import pytest

from engine.pacing import ALONE_FACTOR, FIRST_CHUNK, MAX_CHUNK, MIN_CHUNK, STRETCH, StepPacer


def simulate(pacer: StepPacer, num_decodes: int, *, decode: float, token: float, steps: int = 40) -> int:
    """Let the pacer choose the chunks of a machine with these costs in seconds; returns the last chunk."""
    for _ in range(steps):
        chunk = pacer.prefill_budget(num_decodes)
        pacer.record(num_decodes, chunk, decode + token * chunk)
    return chunk


def test_the_first_chunk_is_small() -> None:
    assert StepPacer(150).prefill_budget(0) == StepPacer(150).prefill_budget(8) == FIRST_CHUNK


@pytest.mark.parametrize("token", [0.00005, 0.0005, 0.003])
def test_steps_with_decodes_settle_at_the_target(token: float) -> None:
    pacer = StepPacer(150)
    for _ in range(10):
        pacer.record(4, 0, 0.08)
    chunk = simulate(pacer, 4, decode=0.08, token=token)
    assert 0.08 + chunk * token == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize("decode", [0.004, 0.01, 0.03])
def test_quick_decodes_are_not_made_to_wait_for_the_whole_target(decode: float) -> None:
    pacer = StepPacer(150)
    for _ in range(10):
        pacer.record(8, 0, decode)
    chunk = simulate(pacer, 8, decode=decode, token=0.0001)
    assert decode + chunk * 0.0001 == pytest.approx(decode * STRETCH, rel=0.1)


def test_steps_take_longer_where_more_wait_than_decode() -> None:
    budgets = []
    for waiting in (1, 8, 16, 32, 1000):
        pacer = StepPacer(150)
        for _ in range(10):
            pacer.record(8, 0, 0.01)
        pacer.record(0, 1000, 0.1)
        budgets.append(pacer.prefill_budget(8, waiting))
    assert budgets[0] == budgets[1] < budgets[2] < budgets[3] < budgets[4] == pytest.approx(1400, rel=0.2)


def test_steps_without_decodes_may_take_longer() -> None:
    chunk = simulate(StepPacer(150), 0, decode=0.0, token=0.003)
    assert chunk * 0.003 == pytest.approx(0.15 * ALONE_FACTOR, rel=0.1)


@pytest.mark.parametrize(("token", "chunk"), [(0.01, 100), (0.5, MIN_CHUNK)])
def test_prefill_keeps_a_share_where_decodes_take_longer_than_the_target(token: float, chunk: int) -> None:
    pacer = StepPacer(150)
    pacer.record(64, 0, 2.0)
    assert simulate(pacer, 64, decode=2.0, token=token) == pytest.approx(chunk, rel=0.1)


def test_a_costly_base_does_not_keep_chunks_small() -> None:
    pacer = StepPacer(150)
    pacer.record(1, 0, 0.12)
    assert simulate(pacer, 0, decode=0.12, token=0.001) == pytest.approx(480, rel=0.1)


def test_a_fast_machine_is_bounded() -> None:
    assert simulate(StepPacer(150), 0, decode=0.0, token=1e-9) == MAX_CHUNK


def test_a_clock_that_stands_still_is_survived() -> None:
    assert simulate(StepPacer(150), 0, decode=0.0, token=0.0) == MAX_CHUNK


def test_a_slow_first_step_is_forgotten() -> None:
    pacer = StepPacer(150)
    pacer.record(0, FIRST_CHUNK, 5.0)
    assert simulate(pacer, 0, decode=0.0, token=0.001, steps=60) == pytest.approx(600, rel=0.1)


def test_outdated_decode_times_do_not_make_prefill_look_free() -> None:
    pacer = StepPacer(150)
    for _ in range(10):
        pacer.record(64, 0, 0.14)
    for _ in range(40):
        chunk = pacer.prefill_budget(1)
        pacer.record(1, chunk, 0.01 + 0.003 * chunk)
        assert 0.01 + 0.003 * chunk < 0.3


def test_a_short_chunk_hardly_changes_the_price() -> None:
    pacer = StepPacer(150)
    before = simulate(pacer, 0, decode=0.0, token=0.001)
    pacer.record(0, 1, 0.02)
    assert pacer.prefill_budget(0) > before * 0.9
