"""The sampler of a GPU: a launch that never waits for the device, and a finish that waits for one copy.

Most rows are chosen by recorded operations on the logits that the runner's steps leave in one place: one launch. Rows
with a mask, penalties or a large top_k are chosen by the same operations, launched one by one, on scores of their own.
All tokens stay on the device for the next step. A row whose token may lie beyond the ranked ones is drawn again,
exactly, when it is read.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Batch
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from engine.api.events import TokenLogprobs
from engine.constraints.masks import Mask
from engine.sampling.device.count_table import CountTable, penalised
from engine.sampling.device.device_draw import BEYOND, COLUMNS, NOT_FINITE, WIDTH, Kind, choose
from engine.sampling.device.exact_draw import WIDTHS, draw
from engine.sampling.device.filters import make_filters
from engine.sampling.device.logprob_tensors import logprob_numbers, read_report, reported
from engine.sampling.device.mask_tensors import ruling_out
from engine.sampling.logprobs import rows_that_ask
from engine.sampling.noise import uniform
from engine.sampling.penalties import has_penalties
from engine.scheduling.contracts import Sampled
from engine.scheduling.sequence import Sequence

_DTYPES = {"B": torch.uint8, "d": torch.float64, "q": torch.int64}


# What is recorded, the cheapest first: a batch takes the first that has all that its rows need.
_KINDS = (
    Kind(draws=False, whole_mass=False, min_p=False),
    Kind(whole_mass=False, min_p=False),
    Kind(min_p=False),
    Kind(),
)


class _Plan(NamedTuple):
    """How the rows of ``sequences`` are chosen, but for their uniform numbers.

    ``settings`` are those of ``choose``, row by row. ``drawn`` rows have a temperature; ``asking`` ones report
    log-probabilities, ``most`` alternatives at most. ``special`` rows have scores of their own, the others are recorded
    as ``kind``; None if there are no others. ``width`` is how many tokens special rows rank.
    """

    sequences: Batch[Sequence]
    settings: array[float]
    drawn: list[int]
    asking: list[int]
    most: int
    special: list[int]
    kind: Kind | None
    width: int


@dataclass(frozen=True, slots=True)
class Launched:
    """Tokens that the device chooses.

    ``found`` is what ``choose`` returns and ``logprobs`` are the numbers of the rows that ask for them: both on their
    way to the host until ``copied``. ``raw`` are the logits of all rows and ``special_scores`` those of the plan's
    special rows: kept where rows may have to be drawn again, with the uniform numbers of the drawn rows, ``points``.
    """

    plan: _Plan
    points: array[float]
    found: torch.Tensor
    logprobs: torch.Tensor | None
    copied: torch.cuda.Event | None
    raw: torch.Tensor | None
    special_scores: torch.Tensor | None

    def scores(self, row: int) -> torch.Tensor:
        """The scores of a row that draws, as the draw takes them."""
        if self.special_scores is not None and row in self.plan.special:
            return self.special_scores[self.plan.special.index(row)]
        assert self.raw is not None, "logits are kept for rows that draw"
        return self.raw[row]


class DeviceSampler:
    """``engine.scheduling.contracts.Sampler``; a token is that of ``BatchSampler`` for the same logits.

    ``logits`` (float32 [max_running, vocabulary]) is where recorded steps leave theirs: what a launch is given is
    copied there, unless it lies there already. The token of row ``i`` goes to ``sampled[i]`` (int64 [max_running]).
    ``sizes`` are the numbers of rows that are recorded, ascending, up to all; ``record`` runs a computation and returns
    what runs it again on the same tensors.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        sizes: Batch[int],
        record: Callable[[Callable[[], None]], Callable[[], None]] = lambda compute: compute,
    ) -> None:
        self._logits = logits
        self._sampled = sampled
        self._sizes = sizes
        self._on_gpu = logits.device.type == "cuda"
        # What is drawn again does not wait for the step that was launched meanwhile.
        self._stream = torch.cuda.Stream(logits.device) if self._on_gpu else None
        max_rows, vocab_size = logits.shape
        self._counts = CountTable(vocab_size, logits.device)
        with torch.inference_mode():
            # Of ones, so that the rows of padding have settings too.
            self._settings = torch.ones(max_rows, len(COLUMNS), dtype=torch.float64, device=logits.device)
            self._found = torch.zeros(max_rows, 2, dtype=torch.int64, device=logits.device)
            self._plan = _plan([], [], vocab_size)  # whose settings are on the device
            self._replays = {
                (kind, size): record(partial(self._choose, kind, size)) for size in reversed(sizes) for kind in _KINDS
            }

    def launch(
        self,
        logits: torch.Tensor,
        sequences: Batch[Sequence],
        masks: Batch[Mask | None],
        pending: Batch[int | None],
    ) -> Launched:
        """As ``Sampler.launch``: ``logits`` are [rows, vocabulary] and valid until the next step."""
        assert len(logits) == len(sequences) == len(masks) == len(pending), "one sequence owns each row"
        count, plan = len(sequences), self._plan
        # Most steps have the rows of the step before, and making a plan costs a microsecond for each.
        is_new = plan.sequences != sequences or any(mask is not None for mask in masks)
        if is_new:
            plan = _plan(sequences, masks, self._logits.shape[1])
        points = array("d", bytes(8 * count))
        for row in plan.drawn:
            sequence = sequences[row]
            # A pending token has its place already.
            position = len(sequence.tokens) + (pending[row] is not None)
            points[row] = uniform(sequence.request.sampling.seed, sequence.candidate, position)
        with torch.inference_mode():
            if count and logits.data_ptr() != self._logits.data_ptr():
                self._logits[:count].copy_(logits)
            raw = self._logits[:count].clone() if plan.drawn else None
            settings = array("d")
            if is_new or plan.drawn:
                settings += plan.settings
                settings[len(COLUMNS) - 1 :: len(COLUMNS)] = points
            special, asks, newest = self._on_device(array("q", plan.special), array("q", plan.asking), settings)
            if settings:
                self._settings[:count].copy_(newest.view(count, len(COLUMNS)))
                self._plan = plan
            self._counts.release()  # once the plan of sequences that ended is gone
            scores = None
            if plan.special:  # before the tokens of the last launch are overwritten
                scores = self._special_scores(plan, special, sequences, masks, pending)
            if plan.kind is not None:
                self._replays[plan.kind, next(size for size in self._sizes if size >= count)]()
            if scores is not None:
                found = choose(scores, self._settings[special], Kind(bool(plan.drawn)), plan.width)
                self._found.index_copy_(0, special, found)
                self._sampled.index_copy_(0, special, found[:, 0])
            logprobs = None
            if plan.asking:
                logprobs = logprob_numbers(self._logits[asks], self._found[asks, :1], plan.most)
            return Launched(
                plan=plan,
                points=points,
                found=self._to_host(self._found[:count]),
                logprobs=None if logprobs is None else self._to_host(logprobs),
                copied=torch.cuda.current_stream().record_event() if self._on_gpu else None,
                raw=raw,
                special_scores=scores,
            )

    def finish(self, launched: Launched) -> list[Sampled]:
        """As ``Sampler.finish``.

        Raises ``FloatingPointError`` as ``BatchSampler.sample`` does.
        """
        if launched.copied is not None:
            launched.copied.synchronize()
        tokens, marks = launched.found.T.tolist()
        if any(mark & NOT_FINITE for mark in marks):
            raise FloatingPointError("the model's logits are not finite")
        sequences = launched.plan.sequences
        reports: list[TokenLogprobs | None] = [None] * len(tokens)
        if launched.logprobs is not None:
            for row, numbers in zip(launched.plan.asking, launched.logprobs.tolist(), strict=True):
                reports[row] = read_report(numbers, sequences[row])
        sampled = list(map(Sampled, tokens, reports))
        if beyond := [row for row, mark in enumerate(marks) if mark & BEYOND]:
            for row, again in zip(beyond, self._drawn_again(launched, beyond), strict=True):
                # The device may have been right.
                if again.token_id != sampled[row].token_id:
                    sampled[row] = again
        return sampled

    def _choose(self, kind: Kind, size: int) -> None:
        """What is recorded."""
        found = choose(self._logits[:size], self._settings[:size], kind)
        self._found[:size].copy_(found)
        self._sampled[:size].copy_(found[:, 0])

    def _special_scores(
        self,
        plan: _Plan,
        special: torch.Tensor,
        sequences: Batch[Sequence],
        masks: Batch[Mask | None],
        pending: Batch[int | None],
    ) -> torch.Tensor:
        """The logits of the special rows with their masks and penalties."""
        masked = [place for place, row in enumerate(plan.special) if masks[row] is not None]
        bits = b"".join(mask for mask in masks if mask is not None)
        with_penalties = [i for i, row in enumerate(plan.special) if has_penalties(sequences[row].request.sampling)]
        rows = [plan.special[place] for place in with_penalties]
        owners = [sequences[row] for row in rows]
        strengths = array("d")
        for owner in owners:
            sampling = owner.request.sampling
            strengths.extend((sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty))
        unread = array("q", [-1 if (row_before := pending[row]) is None else row_before for row in rows])
        masked_at, bytes_, penalised_at, unread_rows, settings, *counted = self._on_device(
            array("q", masked),
            array("B", bits),
            array("q", with_penalties),
            unread,
            strengths,
            *self._counts.missing(owners),
        )
        scores = self._logits[special]
        if masked:
            scores.index_add_(0, masked_at, ruling_out(bytes_.view(len(masked), -1), scores))
        if rows:
            newest = self._sampled[unread_rows.clamp(min=0)].masked_fill(unread_rows < 0, -1)[:, None]
            entries = self._counts.entries(owners, counted)
            changed = penalised(scores[penalised_at], entries, settings.view(len(rows), -1), newest)
            scores.index_copy_(0, penalised_at, changed)
        return scores

    def _drawn_again(self, launched: Launched, rows: list[int]) -> list[Sampled]:
        """The tokens of rows by the exact draw."""
        owners = [launched.plan.sequences[row] for row in rows]
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            scores = torch.stack([launched.scores(row) for row in rows])
            filters = make_filters(owners, scores.shape[1], scores.device)
            tokens = draw(scores, filters, [launched.points[row] for row in rows])
            assert launched.raw is not None, "logits are kept for rows that draw"
            reports = reported(launched.raw[rows], owners, tokens)
        return [Sampled(token, logprobs, redrawn=True) for token, logprobs in zip(tokens, reports, strict=True)]

    def _on_device(self, *parts: array[Any]) -> list[torch.Tensor]:
        """The numbers of each array, by one copy from pinned memory, which torch keeps until the device has read it."""
        packed, spans = bytearray(), []
        for part in parts:
            spans.append((len(packed), len(packed) + len(part) * part.itemsize, _DTYPES[part.typecode]))
            packed += part.tobytes()
            packed += bytes(-len(packed) % 8)  # views of eight bytes each begin at multiples of that
        if not packed:
            return [torch.empty(0, dtype=dtype, device=self._logits.device) for _, _, dtype in spans]
        staged = torch.frombuffer(packed, dtype=torch.uint8)
        if self._on_gpu:
            staged = staged.pin_memory()
        there = staged.to(self._logits.device, non_blocking=True)
        return [there[begin:end].view(dtype) for begin, end, dtype in spans]

    def _to_host(self, numbers: torch.Tensor) -> torch.Tensor:
        """A copy that can be read once the device is done with it."""
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._on_gpu)
        return copy.copy_(numbers, non_blocking=True)


def _plan(sequences: Batch[Sequence], masks: Batch[Mask | None], vocab_size: int) -> _Plan:
    settings, drawn, special, most_kept = array("d"), [], [], 0
    whole_mass = min_p = False
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        is_drawn = sampling.temperature > 0
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        settings.extend((sampling.temperature, top_k, sampling.top_p, sampling.min_p, 0.0))
        is_wide = is_drawn and WIDTH <= top_k < vocab_size
        if is_drawn:
            drawn.append(row)
        if is_wide:
            most_kept = max(most_kept, top_k)
        if is_wide or masks[row] is not None or has_penalties(sampling):
            special.append(row)
        elif is_drawn:
            whole_mass = whole_mass or top_k >= WIDTH
            min_p = min_p or sampling.min_p > 0
    draws, kind = not set(special).issuperset(drawn), None
    if len(special) < len(sequences):
        needs = Kind(draws, whole_mass, min_p)
        kind = next(kind for kind in _KINDS if all(has or not need for has, need in zip(kind, needs, strict=True)))
    width = WIDTH if not most_kept else most_kept + 1 if most_kept < WIDTHS[-1] else vocab_size
    return _Plan(sequences, settings, drawn, *rows_that_ask(sequences), special, kind, width)
