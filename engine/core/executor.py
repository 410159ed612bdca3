"""Computes batches: the forward, the masks in parallel, then the sampler. Retries a failed batch chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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


@dataclass(slots=True)
class InFlight:
    """A batch between its launch and its finish.

    ``sampling`` are the sequences that get a token, one for each row of ``logits``; ``masks`` belong to them. A forward
    that ``failed`` left no logits.
    """

    chunks: list[ScheduledChunk]
    sampling: list[Sequence]
    masks: list[Future[Mask | None] | None]
    started: float
    logits: Any = None
    failed: bool = False


class Executor:
    """Launches batches and finishes them. In between, the device computes and the caller may do something else.

    Reads ``requests``, by id, and changes none of them: ``fail`` ends the request of a sequence that cannot be
    computed. ``pacer`` learns how long each step took, in seconds of ``timer``.
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
        self._runner = runner
        self._sampler = sampler
        self._pacer = pacer
        self._timer = timer
        self._requests = requests
        self._fail = fail
        self._mask_threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="mask")

    def launch(self, batch: list[ScheduledChunk]) -> InFlight:
        """Start to compute a batch, and beside it the masks of candidates that need one.

        Raises ``EngineUnavailable`` if the device is lost.
        """
        started = self._timer()
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        masks: list[Future[Mask | None] | None] = []
        for sequence in sampling:
            candidate = self._requests[sequence.request.id].open[sequence]
            masks.append(self._mask_threads.submit(candidate.mask) if candidate.is_constrained else None)
        in_flight = InFlight(batch, sampling, masks, started)
        try:
            in_flight.logits = self._runner.forward(batch)
        except BaseException as error:  # noqa: BLE001 - raised again where no retry can help
            wait(filter(None, masks))  # a matcher must not be used by two threads at once
            in_flight.failed = True
            self._handle(error, batch)
        return in_flight

    def finish(self, in_flight: InFlight) -> list[tuple[ScheduledChunk, Sampled | None]]:
        """What was computed: the chunks, with the token of those that sample.

        If the batch failed, each chunk is computed alone, so that only the request that cannot be computed ends. Raises
        ``EngineUnavailable`` if the device is lost.
        """
        chunks = in_flight.chunks
        if not in_flight.failed:
            try:
                tokens = self._sample(in_flight)
            except BaseException as error:  # noqa: BLE001 - raised again where no retry can help
                self._handle(error, chunks)
            else:
                return [(chunk, tokens.get(chunk.sequence)) for chunk in chunks]
        if len(chunks) == 1:
            return []
        # By now the error is freed, and with it the memory that its frames held.
        computed = []
        for chunk in chunks:
            if chunk.sequence in self._requests[chunk.sequence.request.id].open:
                computed += self.finish(self.launch([chunk]))
        return computed

    def close(self) -> None:
        """End the threads."""
        self._mask_threads.shutdown(wait=False, cancel_futures=True)

    def _sample(self, in_flight: InFlight) -> dict[Sequence, Sampled]:
        # Taken out, so that the logits of a failed batch do not keep their memory while its chunks are tried alone.
        logits, in_flight.logits = in_flight.logits, None
        wait(filter(None, in_flight.masks))  # all of them, even if one failed: a matcher is not thread-safe
        masks = [mask.result() if mask else None for mask in in_flight.masks]
        sampling = in_flight.sampling
        sampled = self._sampler.sample(logits, sampling, masks) if sampling else []
        # The device may still be computing when forward returns; the sampled tokens are what to wait for.
        seconds = self._timer() - in_flight.started
        # A prompt's last token alone costs what a decode costs.
        prefill = [chunk.num_tokens for chunk in in_flight.chunks if chunk.num_tokens > 1]
        self._pacer.record(len(in_flight.chunks) - len(prefill), sum(prefill), seconds)
        return dict(zip(sampling, sampled, strict=True))

    def _handle(self, error: BaseException, chunks: list[ScheduledChunk]) -> None:
        """End the request of a chunk that failed alone. Raises errors that no retry can help."""
        if isinstance(error, (EngineUnavailable, *NOT_FAILURES)):
            raise error
        self._runner.check()  # a lost device fails with any error, and then with every chunk that is tried alone
        if len(chunks) == 1:
            self._fail(chunks[0].sequence, error)
        else:
            log.warning("a step of %d sequences failed, each is tried alone", len(chunks), exc_info=error)
