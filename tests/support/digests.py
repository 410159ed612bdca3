"""A runner and samplers in pure Python that see every wrongly shared or stale page; and what a request was told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

from support.tiny import EOS_ID, VOCAB_SIZE, tiny_tokenizer

from engine.api.block_groups import BlockGroup
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import OutOfMemory
from engine.api.events import (
    CandidateFinished,
    Delta,
    Event,
    FinishReason,
    RequestEvents,
    RequestFinished,
    TokenLogprobs,
)
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.constraints.contracts import Grammars, Matcher
from engine.constraints.masks import Mask, allows, only
from engine.core.core import Core
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import ScheduledChunk, Sequence

TOKENIZER = tiny_tokenizer()
AHEAD = False  # whether cores launch each step before the tokens of the one before are read
FIRST_BYTE = 3


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)


class WrongPage(SystemExit):
    """A page does not hold what it should; no failure of a request, so that the core cannot take it for one."""


def expect(condition: bool, problem: str) -> None:
    if not condition:
        raise WrongPage(problem)


def prefix_digests(sequence: Sequence, unread: Iterable[int] = ()) -> list[int]:
    """For each token, what stands for all tokens up to it, under the request's salt, and for how it is rotated."""
    digest = crc32(sequence.request.salt.encode()) ^ sequence.is_long  # the same in every process, unlike hash(text)
    return [digest := hash((digest, token)) for token in (*sequence.tokens, *unread)]


class DigestRunner:
    """Writes each token's prefix digest into its slot and checks every slot that attention would read.

    All tokens of a sequence beyond the original context have other digests. A model with recurrent
    states carries the digest of the last token in the sequence's slot for states; a batch that fails leaves there what
    means nothing.

    ``sampled`` are the tokens of the step before, where the host has not read them. ``refuse`` may raise to make a
    batch fail, and ``check`` as if the device were lost; ``shortage`` may name memory as the reason. Each token takes a
    second of ``seconds``.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.slots: dict[tuple[int, int], int] = {}  # by layer group and slot
        self.states: dict[int, int | None] = {}
        self.sampled: list[int] = []
        self.batches: list[list[ScheduledChunk]] = []
        self.seconds = 0.0
        self.refuse: Callable[[list[ScheduledChunk]], None] = lambda batch: None
        self.check: Callable[[], None] = lambda: None
        self.shortage: Callable[[BaseException], OutOfMemory | None] = lambda error: None

    def forward(self, batch: list[ScheduledChunk]) -> list[int]:
        self.batches.append(batch)
        carried = self._carried(batch) if self.info.state_bytes else []
        self.states.update(dict.fromkeys([chunk.sequence.state_slot for chunk in batch], None))
        self.refuse(batch)
        self.states.update(carried)
        self.seconds += sum(chunk.num_tokens for chunk in batch)
        self._expect_what_was_computed(batch)
        written: set[tuple[int, int]] = set()
        for chunk in batch:
            digests = self._digests(chunk.sequence)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                for group in range(len(self.info.groups)):
                    slot = self._slot(chunk.sequence, group, position)
                    expect(slot not in written, "two chunks write one slot")
                    written.add(slot)
                    self.slots[slot] = digests[position]
        self._expect_what_was_computed(batch)
        return [self._digests(chunk.sequence)[-1] for chunk in batch if chunk.samples]

    def _carried(self, batch: list[ScheduledChunk]) -> list[tuple[int, int]]:
        """What the slots of states hold after a batch; checks what they held before."""
        carried = []
        slots = [chunk.sequence.state_slot for chunk in batch]
        expect(len(set(slots)) == len(slots), "two sequences have one slot")
        for sequence, start, num_tokens, snapshot in batch:
            slot = sequence.state_slot
            if start == sequence.state_start:
                slot = sequence.state_slot if sequence.state_source is None else sequence.state_source
            begins = start == sequence.state_start and sequence.state_source is None
            digests = self._digests(sequence)
            held = None if begins else self.states.get(slot)
            expect(begins == (start == 0), "states begin within a sequence")
            expect(held == (digests[start - 1] if start else None), "a slot holds the states of something else")
            last = digests[start + num_tokens - 1]
            carried += [(target, last) for target in (sequence.state_slot, snapshot) if target is not None]
        return carried

    def _digests(self, sequence: Sequence) -> list[int]:
        return prefix_digests(sequence, [self.sampled[sequence.unread_row]] if sequence.num_unread else [])

    def _expect_what_was_computed(self, batch: Iterable[ScheduledChunk]) -> None:
        original = self.info.original_context
        for chunk in batch:
            expect(chunk.start == chunk.sequence.num_launched, "chunk does not begin where the last one ended")
            expect(
                chunk.sequence.is_long == (0 < original < chunk.sequence.num_known), "a chunk is rotated as if shorter"
            )
            digests = self._digests(chunk.sequence)
            for group, (_, window) in enumerate(self.info.groups):
                for position in range(window.first_seen(chunk.start) if window else 0, chunk.start):
                    held = self.slots.get(self._slot(chunk.sequence, group, position))
                    expect(held == digests[position], "a page holds another content")

    def _slot(self, sequence: Sequence, group: int, position: int) -> tuple[int, int]:
        block = sequence.tables[group][position // self.info.block_size]
        expect(0 <= block < self.info.groups[group].num_blocks, "no such block")
        expect(position // self.info.block_size >= sequence.passed[group], "a block was given back that is still seen")
        return group, block * self.info.block_size + position % self.info.block_size


@dataclass
class LowTokens:
    """A grammar of ``length`` tokens from the lower half of the bytes."""

    length: int
    count: int = 0
    error: str = ""

    @property
    def stopped(self) -> bool:
        return self.count >= self.length

    @property
    def accepting(self) -> bool:
        return self.stopped

    def mask(self) -> Mask:
        return only(range(FIRST_BYTE, FIRST_BYTE + 128), VOCAB_SIZE)

    def allows(self, token_id: int) -> bool:
        return FIRST_BYTE <= token_id < FIRST_BYTE + 128

    def consume(self, token_id: int) -> None:
        assert self.allows(token_id)
        self.count += 1

    def restart(self) -> None:
        self.count = 0

    def copy(self) -> LowTokens:
        return replace(self)


class LowGrammars:
    """Builds ``LowTokens`` of the length that the grammar says."""

    def build(self, grammar: str) -> Matcher:
        return LowTokens(int(grammar))


def nearest(token: int, mask: Mask | None) -> int:
    """The token itself, or the lowest one that is allowed in its place."""
    if mask is None or allows(mask, token):
        return token
    return next(other for other in range(VOCAB_SIZE) if allows(mask, other))


class DigestSampler:
    """The next token follows from the prefix, the seed and the candidate; now and then it is the end token.

    Like a device, it chooses when it is launched, and leaves the tokens to the ``runner`` if there is one. Every
    ``redraws``-th token that was left there turns out to be another one.
    """

    def __init__(self, runner: DigestRunner | None = None, redraws: int = 0) -> None:
        self.runner = runner
        self._redraws = redraws
        self._left = 0

    def launch(
        self, logits: list[int], sequences: list[Sequence], masks: list[Mask | None], pending: list[int | None]
    ) -> list[Sampled]:
        assert len(logits) == len(sequences) == len(masks) == len(pending)
        assert all((row is None) == (not owner.num_unread) for row, owner in zip(pending, sequences, strict=True))
        sampled = [self.choose(*row) for row in zip(logits, sequences, masks, strict=True)]
        if self.runner is None:
            return sampled
        found = [self._maybe_redrawn(one) for one in sampled]
        wrong = [(one.token_id + one.redrawn * 7) % VOCAB_SIZE for one in found]
        self.runner.sampled = wrong
        return found

    def finish(self, launched: list[Sampled]) -> list[Sampled]:
        return launched

    def choose(self, row: int, sequence: Sequence, mask: Mask | None) -> Sampled:
        choice = hash((row, sequence.request.sampling.seed, sequence.candidate))
        num_sampled = sequence.num_sampled + sequence.num_unread
        token = EOS_ID if choice % 16 == 0 and num_sampled else FIRST_BYTE + choice // 16 % 256
        wanted = sequence.request.sampling.logprobs is not None
        return Sampled(nearest(token, mask), TokenLogprobs(-float(choice % 100)) if wanted else None)

    def _maybe_redrawn(self, sampled: Sampled) -> Sampled:
        self._left += 1
        return sampled._replace(redrawn=bool(self._redraws) and self._left % self._redraws == 0)


class ScriptedSampler(DigestSampler):
    """Answers each candidate with the tokens written for it, then with the end token."""

    def __init__(self, *answers: Iterable[int]) -> None:
        super().__init__()
        self._answers = [list(answer) for answer in answers]

    def choose(self, _row: int, sequence: Sequence, mask: Mask | None) -> Sampled:
        answer = self._answers[sequence.candidate % len(self._answers)]
        place = sequence.num_sampled + sequence.num_unread
        return Sampled(nearest(answer[place] if place < len(answer) else EOS_ID, mask), None)


def model_info(
    num_blocks: int = 64,
    block_size: int = 4,
    max_context: int = 128,
    snapshots: int | None = None,
    groups: tuple[BlockGroup, ...] = (),
    original_context: int = 0,
) -> ModelInfo:
    """With a number of ``snapshots`` the model has recurrent states. ``groups`` replace the one of ``num_blocks``."""
    groups = groups or (BlockGroup(num_blocks),)
    info = ModelInfo("digests", 0, "none", "cpu", VOCAB_SIZE, max_context, block_size, groups, 8, (EOS_ID,))
    info = replace(info, original_context=original_context)
    return info if snapshots is None else replace(info, state_bytes=1, num_snapshots=snapshots)


def make_core(
    sampler: DigestSampler | None = None,
    *,
    info: ModelInfo | None = None,
    max_running: int = 8,
    step_target_ms: float = 1e-6,
    clock: Callable[[], float] = lambda: 0.0,
    grammars: Grammars | None = None,
    ahead: bool | None = None,
    state_stride: int = 1024,
) -> tuple[Core, DigestRunner]:
    """A core whose chunks are small or, with a large target, as large as can be."""
    runner = DigestRunner(replace(info or model_info(), max_running=max_running))
    config = EngineConfig(path="", max_running=max_running, step_target_ms=step_target_ms, state_stride=state_stride)
    chosen = sampler or DigestSampler()
    ahead = AHEAD if ahead is None else ahead
    chosen.runner = runner if ahead else None
    core = Core(
        runner, chosen, TOKENIZER, config, ahead=ahead, grammars=grammars, clock=clock, timer=lambda: runner.seconds
    )
    return core, runner


def make_request(
    request_id: str = "r",
    prompt: Iterable[int] = (5, 6, 7),
    *,
    candidates: int = 1,
    salt: str = "",
    deadline: float | None = None,
    max_tokens: int = 8,
    resume_points: tuple[int, ...] = (),
    **sampling: Any,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **{"stop_ids": (EOS_ID,), **sampling})
    return Request(request_id, tuple(prompt), params, candidates, salt, deadline, resume_points)


@dataclass
class Told:
    """What one request was told; adding an event checks the protocol's order.

    ``tokens`` are all tokens, ``thoughts`` those of them in thoughts; ``text`` is the answer's alone.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    thoughts: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    thought_text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)
    done: RequestFinished | None = None

    def add(self, event: Event) -> None:
        assert self.done is None, "an event after the last"
        if isinstance(event, Delta):
            self._add_delta(event)
        elif isinstance(event, CandidateFinished):
            assert event.candidate not in self.reasons, "a candidate ended twice"
            assert event.tokens == len(self.tokens.get(event.candidate, []))
            assert event.thoughts == len(self.thoughts.get(event.candidate, []))
            assert bool(event.message) == (event.reason is FinishReason.MALFORMED)
            self.reasons[event.candidate] = event.reason
            self.messages[event.candidate] = event.message
        else:
            assert event.thought_tokens == sum(map(len, self.thoughts.values()))
            assert event.candidate_tokens == sum(map(len, self.tokens.values()))
            self.done = event

    def _add_delta(self, delta: Delta) -> None:
        assert delta.candidate not in self.reasons, "a delta after the candidate's end"
        assert len(delta.logprobs) in (0, len(delta.token_ids))
        self.tokens.setdefault(delta.candidate, []).extend(delta.token_ids)
        if delta.thought:
            self.thoughts.setdefault(delta.candidate, []).extend(delta.token_ids)
        text = self.thought_text if delta.thought else self.text
        text[delta.candidate] = text.get(delta.candidate, "") + delta.text
        self.logprobs.setdefault(delta.candidate, []).extend(delta.logprobs)


def tell(told: dict[str, Told], events: list[RequestEvents]) -> None:
    """Sort a step's events by request."""
    assert len({batch.request_id for batch in events}) == len(events), "a request was told twice in one step"
    for batch in events:
        for event in batch:
            told.setdefault(batch.request_id, Told()).add(event)


def run_to_end(
    core: Core, *requests: Request, told: dict[str, Told] | None = None, cancelled: Collection[str] = ()
) -> dict[str, Told]:
    """Submit the requests, step until nothing is left to do, and check that nothing is left over.

    Those that are ``cancelled`` are so after some steps, one after another.
    """
    for request in requests:
        core.submit(request)
    told = {} if told is None else told
    ending = dict(enumerate(cancelled, start=5))
    for step in range(5000):
        if not core.has_work:
            break
        if step in ending:
            core.cancel(ending[step])
        tell(told, core.step())
        core.check()
    assert not core.has_work, "the core did not come to an end"
    return told
