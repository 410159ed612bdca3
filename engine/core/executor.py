"""Computes batches: the forward, the masks in parallel, then the sampler. Retries a failed batch chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import inf
from typing import Any

from engine.api.errors import EngineUnavailable
from engine.constraints.masks import Mask
from engine.core.request_state import RequestState
from engine.failures import NOT_FAILURES
from engine.scheduling.chunk_budget import StepPacer
from engine.scheduling.contracts import Runner, Sampled, Sampler
from engine.scheduling.sequence import ScheduledChunk, Sequence

log = logging.getLogger(__name__)

MASK_THREADS = 2
# Tokens of a step that computes again what a sequence has computed already: harmless on any device.
AGAIN = 256


@dataclass(slots=True)
class InFlight:
    """A batch between its launch and its finish.

    ``sampling`` are the sequences that get a token, in the order of what was ``launched`` for them by the sampler;
    ``rewinds`` are the ``num_rewinds`` of the chunks' sequences. A batch that ``failed`` left nothing on the device.
    """

    chunks: list[ScheduledChunk]
    sampling: list[Sequence]
    rewinds: list[int]
    started: float
    launched: Any = None
    failed: bool = False


class Executor:
    """Launches batches and finishes them, in order. In between, the device computes and the caller does something else.

    One batch may be launched while the one before it is in flight: the tokens that it needs are then read on the
    device. Reads ``requests``, by id, and changes none of them: ``fail`` ends the request of a sequence that cannot be
    computed. ``pacer`` learns how long each step took, in seconds of ``timer``. ``num_sampled`` counts the tokens that
    were read, ``num_redrawn`` those of them that the device had wrong (``Sampled.redrawn``).
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        pacer: StepPacer,
        timer: Callable[[], float],
        requests: Mapping[str, RequestState],
        fail: Callable[[Sequence, BaseException], None],
    ) -> None:
        self.num_sampled = 0
        self.num_redrawn = 0
        self._runner = runner
        self._sampler = sampler
        self._pacer = pacer
        self._timer = timer
        self._requests = requests
        self._fail = fail
        self._last_finished = -inf
        self._mask_threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="mask")

    def launch(self, batch: list[ScheduledChunk]) -> InFlight:
        """Start to compute a batch, and its masks beside it; its sequences count as computed and sampled from here on.

        Raises ``EngineUnavailable`` if the device is lost.
        """
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        rewinds = [chunk.sequence.num_rewinds for chunk in batch]
        in_flight = InFlight(batch, sampling, rewinds, self._timer())
        masks: dict[int, Future[Mask | None]] = {}
        for row, sequence in enumerate(sampling):
            if sequence.runs_ahead:
                continue  # nothing constrains it
            candidate = self._requests[sequence.request.id].open[sequence]
            if candidate.is_constrained:
                masks[row] = self._mask_threads.submit(candidate.mask)
        try:
            logits = self._runner.forward(batch)
            wait(masks.values())
            pending = [sequence.unread_row if sequence.num_unread else None for sequence in sampling]
            found: list[Mask | None] = [None] * len(sampling)
            for row, mask in masks.items():
                found[row] = mask.result()
            in_flight.launched = self._sampler.launch(logits, sampling, found, pending)
        except BaseException as error:  # noqa: BLE001 - raised again where no retry can help
            wait(masks.values())  # all of them, even if one failed: a matcher is not thread-safe
            in_flight.failed = True
            for chunk in batch:
                chunk.sequence.has_lost_states = True  # it may have been advanced in some layers
            self._handle(error, batch)
            return in_flight
        for chunk in batch:
            chunk.sequence.num_launched = chunk.start + chunk.num_tokens
        for row, sequence in enumerate(sampling):
            sequence.num_unread += 1
            sequence.unread_row = row
        return in_flight

    def finish(self, in_flight: InFlight, *later: InFlight) -> list[tuple[ScheduledChunk, Sampled | None]]:
        """What was computed: the chunks that still count, with the token of those that sample.

        If the batch failed, each chunk is computed alone, so that only the request that cannot be computed ends; what
        was launched ``later`` counts no longer. Raises ``EngineUnavailable`` if the device is lost.
        """
        # A sequence that ended, was preempted or redrawn meanwhile has been rewound.
        chunks = zip(in_flight.chunks, in_flight.rewinds, strict=True)
        live = [chunk for chunk, rewinds in chunks if chunk.sequence.num_rewinds == rewinds]
        if not live:
            return []
        if not in_flight.failed:
            try:
                tokens = self._read(in_flight)
            except BaseException as error:  # noqa: BLE001 - raised again where no retry can help
                for lost in (in_flight, *later):
                    for chunk in lost.chunks:
                        chunk.sequence.rewind()
                self._handle(error, live)
            else:
                for chunk in live:
                    chunk.sequence.num_unread -= chunk.sequence in tokens
                return [(chunk, tokens.get(chunk.sequence)) for chunk in live]
        if len(in_flight.chunks) == 1:
            return []
        # By now the error is freed, and with it the memory that its frames held.
        computed = []
        for chunk in live:
            if chunk.sequence in self._requests[chunk.sequence.request.id].open and self._regain_states(chunk):
                computed += self.finish(self.launch([chunk]))
        return computed

    def close(self) -> None:
        """End the threads."""
        self._mask_threads.shutdown(wait=False, cancel_futures=True)

    def _regain_states(self, chunk: ScheduledChunk) -> bool:
        """Compute the states before a chunk again, from the first token on; False if that failed.

        The keys and values on the way are written once more, with the same numbers.
        """
        sequence = chunk.sequence
        if not self._runner.info.state_bytes:
            return True
        sequence.state_start, sequence.state_source, sequence.has_lost_states = 0, None, False
        sequence.num_launched = 0
        again = (ScheduledChunk(sequence, at, min(AGAIN, chunk.start - at)) for at in range(0, chunk.start, AGAIN))
        return all(self.finish(self.launch([part])) for part in again)

    def _read(self, in_flight: InFlight) -> dict[Sequence, Sampled]:
        # Taken out, so that the logits of a failed batch do not keep their memory while its chunks are tried alone.
        launched, in_flight.launched = in_flight.launched, None
        sampled = self._sampler.finish(launched)
        # The device may still be computing when a launch returns; the sampled tokens are what to wait for. A step that
        # was launched ahead begins when the one before it ends.
        now = self._timer()
        seconds = now - max(in_flight.started, self._last_finished)
        self._last_finished = now
        self.num_sampled += len(sampled)
        self.num_redrawn += sum(one.redrawn for one in sampled)
        # A prompt's last token alone costs what a decode costs.
        prefill = [chunk.num_tokens for chunk in in_flight.chunks if chunk.num_tokens > 1]
        self._pacer.record(len(in_flight.chunks) - len(prefill), sum(prefill), seconds)
        return dict(zip(in_flight.sampling, sampled, strict=True))

    def _handle(self, error: BaseException, chunks: list[ScheduledChunk]) -> None:
        """End the request of a chunk that failed alone. Raises errors that no retry can help."""
        if isinstance(error, (EngineUnavailable, *NOT_FAILURES)):
            raise error
        self._runner.check()  # a lost device fails with any error, and then with every chunk that is tried alone
        shortage = self._runner.shortage(error)
        if len(chunks) == 1:
            self._fail(chunks[0].sequence, shortage or error)
        else:
            log.warning("a step of %d sequences failed, each is tried alone", len(chunks), exc_info=error)
