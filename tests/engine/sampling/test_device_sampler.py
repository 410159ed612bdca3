"""The sampler that never waits against the one that does, token for token: a step ahead, with all that rows may ask."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.recording import nothing_waits, record
from test_sampler import sequence

from engine.constraints.masks import Mask, all_but, only
from engine.sampling import BatchSampler
from engine.sampling.device import DeviceSampler
from engine.sampling.device.device_sampler import Launched
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence

VOCABULARY, ROWS = 128 * 70, 8


class Device:
    """A sampler with the buffers that a runner would own. A launch raises where it would wait for a GPU."""

    def __init__(self, rows: int = ROWS, vocab_size: int = VOCABULARY) -> None:
        self.logits = torch.zeros(rows, vocab_size)
        self.sampled = torch.zeros(rows, dtype=torch.long)
        self.recordings = 0
        self.replayed: list[int] = []
        sizes = [size for size in (1, 2, 4) if size < rows]
        self.sampler = DeviceSampler(self.logits, self.sampled, [*sizes, rows], self._record)

    def _record(self, compute: Callable[[], None]) -> Callable[[], None]:
        replay, number = record(compute), self.recordings
        self.recordings += 1

        def counted() -> None:
            self.replayed.append(number)
            replay()

        return counted

    def launch(
        self,
        logits: torch.Tensor,
        sequences: list[Sequence],
        masks: list[Mask | None] | None = None,
        pending: list[int | None] | None = None,
        *,
        in_place: bool = True,
    ) -> Launched:
        """``in_place``: the logits are where recorded steps leave them, until the next step."""
        nothing: list[None] = [None] * len(sequences)
        if in_place:
            logits = self.logits[: len(logits)].copy_(logits)
        with nothing_waits():
            return self.sampler.launch(logits, sequences, masks or nothing, pending or nothing)

    def sample(self, logits: torch.Tensor, sequences: list[Sequence], masks: Any = None) -> list[Sampled]:
        return self.sampler.finish(self.launch(logits, sequences, masks))


def expected(
    logits: torch.Tensor, sequences: list[Sequence], masks: list[Mask | None], fed: list[int | None]
) -> list[Sampled]:
    """The tokens of the sampler that waits, for sequences that hold the tokens they were ``fed``."""
    known = [
        Sequence(owner.request, owner.candidate, owner.tokens + ([] if token is None else [token]))
        for owner, token in zip(sequences, fed, strict=True)
    ]
    return BatchSampler().sample(logits, known, masks)


SUM_ERROR = 3e-5


def assert_same(found: Sampled, right: Sampled) -> None:
    """The same token, and the same log-probabilities but for the errors of long sums of float32; torch's is the larger.

    Which of several equal candidates the device reports last is not said.
    """
    assert found.token_id == right.token_id
    assert (found.logprobs is None) == (right.logprobs is None)
    if found.logprobs is not None and right.logprobs is not None:
        assert found.logprobs.chosen == pytest.approx(right.logprobs.chosen, abs=SUM_ERROR)
        for one, other in zip(found.logprobs.top, right.logprobs.top, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=SUM_ERROR)
            is_last = other.logprob < right.logprobs.top[-1].logprob + SUM_ERROR
            assert one.token_id == other.token_id or is_last


def random_sequence(rnd: random.Random) -> Sequence:
    settings: dict[str, Any] = {
        "temperature": rnd.choice([0.0, 0.0, 0.4, 1.0, 1.0, 1.5]),
        "seed": rnd.randrange(100),
        "candidate": rnd.randrange(3),
    }
    if rnd.random() < 0.5:
        settings |= {"top_k": rnd.choice([1, 40, 64, 65, 200, 1023, 5000, 10**9]), "top_p": rnd.choice([1.0, 0.9, 0.3])}
    if rnd.random() < 0.3:
        settings["min_p"] = rnd.choice([0.02, 0.5])
    if rnd.random() < 0.3:
        settings["logprobs"] = rnd.choice([0, 1, 5, 20])
    if rnd.random() < 0.4:
        settings |= {
            "repetition_penalty": rnd.choice([1.0, 1.3, 0.8]),
            "presence_penalty": rnd.choice([0.0, 0.5, -1.0]),
            "frequency_penalty": rnd.choice([0.0, 0.3]),
        }
    return sequence(tuple(rnd.randrange(40) for _ in range(rnd.randrange(4))), position=rnd.randrange(1, 9), **settings)


def random_logits(rnd: random.Random, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rnd.randrange(10**9))
    spreads = torch.tensor([rnd.choice([0.0, 0.3, 2.0, 5.0]) for _ in range(rows)])[:, None]
    logits = torch.randn(rows, VOCABULARY, generator=generator) * spreads
    logits[:, :40] += 6 * spreads  # so that tokens come again and are penalised
    return logits.round() if rnd.random() < 0.3 else logits


def random_mask(rnd: random.Random) -> Mask | None:
    few = [rnd.randrange(VOCABULARY) for _ in range(30)]
    return rnd.choice([None, None, None, only(few, VOCABULARY), all_but(few, VOCABULARY)])


@pytest.mark.parametrize("seed", range(5))
def test_a_step_ahead_every_token_is_that_of_the_sampler_that_waits(seed: int) -> None:
    rnd, device = random.Random(seed), Device()
    owners = [random_sequence(rnd) for _ in range(14)]
    unread: dict[Sequence, int] = {}
    in_flight: tuple[Launched, list[Sampled], list[int]] | None = None
    void: set[Sequence] = set()
    read_tokens: list[Sampled] = []

    def read() -> None:
        nonlocal in_flight
        if in_flight is None:
            return
        launched, wanted, fed = in_flight
        in_flight, invalid = None, set(void)
        void.clear()
        for owner, found, right, token in zip(
            launched.plan.sequences, device.sampler.finish(launched), wanted, fed, strict=True
        ):
            assert_same(found, right)
            assert found.redrawn == (found.token_id != token)
            read_tokens.append(found)
            if owner not in invalid:
                owner.tokens.append(found.token_id)
                if found.redrawn:
                    void.add(owner)

    for _ in range(25):
        if rnd.random() < 0.2:
            read()
            void.clear()
            unread = {}
            lost = rnd.choice(owners)
            owners[owners.index(lost)] = random_sequence(rnd)
            back = rnd.choice(owners)
            del back.tokens[len(back.tokens) - rnd.randrange(len(back.sampled) + 1) :]
        batch = rnd.sample(owners, rnd.randrange(1, ROWS + 1))
        masks = [None if owner in unread else random_mask(rnd) for owner in batch]
        logits, pending = random_logits(rnd, len(batch)), [unread.get(owner) for owner in batch]
        fed = [None if row is None else int(device.sampled[row]) for row in pending]
        wanted = expected(logits, batch, masks, fed)
        launched = device.launch(logits, batch, masks, pending, in_place=rnd.random() < 0.7)
        now = device.sampled.tolist()
        read()
        void.intersection_update(owner for owner, row in zip(batch, pending, strict=True) if row is not None)
        in_flight = launched, wanted, now[: len(batch)]
        unread = {owner: row for row, owner in enumerate(batch) if owner not in void}
        for owner in void:
            assert owner in batch
    read()
    assert len(read_tokens) > 60
    assert {found.redrawn for found in read_tokens} == {True, False}


def test_greedy_rows_keep_no_logits_and_rank_nothing() -> None:
    device = Device()
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    launched = device.launch(logits, [sequence(temperature=0.0)] * 3)
    assert launched.raw is None
    greedy = device.replayed[-1]
    launched = device.launch(logits, [sequence(temperature=0.0), sequence(top_k=64), sequence(top_k=3)])
    assert launched.raw is not None
    within_top_k = device.replayed[-1]
    device.launch(logits, [sequence(temperature=0.0), sequence(top_p=0.9), sequence(top_k=3)])
    whole_mass = device.replayed[-1]
    device.launch(logits, [sequence(temperature=0.0), sequence(top_p=0.9), sequence(min_p=0.1)])
    assert len({greedy, within_top_k, whole_mass, device.replayed[-1]}) == 4
    assert len(device.replayed) == 4


def test_rows_of_their_own_replay_nothing_and_leave_their_tokens_to_the_next_step() -> None:
    device = Device()
    logits = torch.zeros(3, VOCABULARY)
    masks = [only([n + 5], VOCABULARY) for n in range(3)]
    assert [sampled.token_id for sampled in device.sample(logits, [sequence()] * 3, masks)] == [5, 6, 7]
    assert device.replayed == []
    assert device.sampled[:3].tolist() == [5, 6, 7]


def test_a_token_beyond_the_ranked_ones_is_drawn_from_logits_that_the_next_step_has_overwritten() -> None:
    device = Device()
    flat = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1)) / 10
    owners = [sequence(seed=n, logprobs=3) for n in range(4)]
    launched = device.launch(flat, owners)
    fed = device.sampled[:4].tolist()
    device.launch(-flat, owners, pending=[0, 1, 2, 3])
    found = device.sampler.finish(launched)
    for sampled, right in zip(found, BatchSampler().sample(flat, owners, [None] * 4), strict=True):
        assert_same(sampled, right)
    assert all(sampled.redrawn for sampled in found)
    assert all(sampled.token_id != token for sampled, token in zip(found, fed, strict=True))


def test_a_pending_token_counts_for_its_launch_alone() -> None:
    """One that is discarded is not counted later."""
    device = Device()
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7], logits[0, 9] = 2.0, 1.5
    owner = sequence(temperature=0.0, frequency_penalty=1.0)
    assert device.sampler.finish(device.launch(logits, [owner]))[0].token_id == 7
    assert device.sampler.finish(device.launch(logits, [owner], pending=[0]))[0].token_id == 9
    assert device.sampler.finish(device.launch(logits, [owner]))[0].token_id == 7
    owner.tokens.append(7)
    assert device.sampler.finish(device.launch(logits, [owner]))[0].token_id == 9


def test_counts_do_not_outlive_their_sequences() -> None:
    device = Device()
    owners = [sequence((1,), presence_penalty=1.0) for _ in range(3)]
    device.sample(torch.zeros(3, VOCABULARY), owners)
    table = device.sampler._counts
    assert table._table.shape == (4, VOCABULARY)
    kept = owners.pop()
    del owners[:]
    gc.collect()
    device.sample(torch.zeros(2, VOCABULARY), [kept, sequence((1,), presence_penalty=1.0)])
    assert len(table._table) == 4, "rows are used again"
    del kept
    gc.collect()
    device.sample(torch.zeros(1, VOCABULARY), [sequence()])
    assert len(table._table) == 0


def test_a_launch_that_fails_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    owner = sequence((1, 1), temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 1] = 1.5
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "index_fill_", lambda *_args: torch.ones(1).item())
        with pytest.raises(RuntimeError, match="waits for the device"):
            device.launch(logits, [owner])
    assert device.sample(logits, [owner])[0].token_id == 0


@pytest.mark.parametrize("settings", [{}, {"presence_penalty": 1.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_when_it_is_read(bad: float, settings: dict[str, Any]) -> None:
    device = Device()
    logits = torch.zeros(3, VOCABULARY)
    logits[1, 70] = bad
    owners = [sequence(temperature=0.0), sequence((3,), **settings), sequence()]
    launched = device.launch(logits, owners)
    with pytest.raises(FloatingPointError):
        device.sampler.finish(launched)
    assert device.sample(logits[:1], owners[:1])[0].token_id == 0


def test_a_mask_that_leaves_nothing_possible_fails() -> None:
    device = Device()
    with pytest.raises(FloatingPointError):
        device.sample(torch.zeros(1, VOCABULARY), [sequence()], [only([], VOCABULARY)])


def test_no_rows_make_no_tokens() -> None:
    device = Device()
    assert device.sample(torch.empty(0, VOCABULARY), []) == []
    assert device.replayed == []


@pytest.mark.parametrize("vocab_size", [5003, 320, 40])
def test_any_vocabulary_will_do(vocab_size: int) -> None:
    device = Device(4, vocab_size)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    owners = [
        sequence((1, 2), temperature=0.0),
        sequence((1, 2), presence_penalty=1.0, logprobs=20),
        sequence(top_k=30, top_p=0.9),
        sequence(seed=9),
    ]
    masks = [None, all_but([3], vocab_size), None, only(range(0, vocab_size, 3), vocab_size)]
    for found, right in zip(
        device.sample(logits, owners, masks), BatchSampler().sample(logits, owners, masks), strict=True
    ):
        assert_same(found, right)


def test_the_logits_handed_in_stay_as_they_are() -> None:
    device = Device()
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    owners = [sequence((1, 2), presence_penalty=1.0, logprobs=3), sequence()]
    device.launch(logits, owners, [only([1, 2], VOCABULARY), None])
    assert torch.equal(device.logits[:2], logits)
