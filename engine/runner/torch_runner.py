"""From a batch of chunks to logits: one forward of the model over the tokens of all sequences, laid end to end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Chunks
from contextlib import AbstractContextManager, nullcontext

import torch

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.attention.base import AttentionBackend, GraphAttention
from engine.device.cuda_health import require_device
from engine.device.device_memory import release_idle, who_holds
from engine.device.shortage import ran_out, step_ran_out
from engine.model import attention_hook
from engine.model.loader import LoadedModel, Progress
from engine.recurrent import mixer_hook
from engine.recurrent.states import RecurrentStates
from engine.runner.cuda_graphs import RecordedSteps, Recorder, known_ids
from engine.scheduling.flat_batch import FlatBatch, StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk


class ModelRunner:
    """``engine.scheduling.contracts.Runner`` over a transformers model whose attention goes to ``attention``.

    ``sampled`` (int64 [max_running], on the device, zeros at first) holds tokens that the host need not know: whoever
    samples writes them there, and a token ``-1 - r`` of a later step is what ``sampled[r]`` holds by then. Nothing
    waits for the device in between. ``recorded`` are the steps that are replayed, None where none is.
    """

    def __init__(
        self,
        model: LoadedModel,
        attention: AttentionBackend,
        info: ModelInfo,
        states: RecurrentStates | None = None,
    ) -> None:
        self.info = info
        self._model = model.module
        self.attention = attention
        self._device = torch.device(info.device)
        self._windows = model.probe.windows
        self.sampled = torch.zeros(info.max_running, dtype=torch.long, device=self._device)
        self.recorded: RecordedSteps | None = None
        self._long_rope = model.long_rope
        self._is_short = False  # a step has just failed for want of memory
        for layer in model.probe.layers:
            chunk_size = layer.window.size if layer.window and layer.window.chunked else None
            paged = attention_hook.PagedLayer(attention, layer.place, writes=layer.writes, chunk_size=chunk_size)
            attention_hook.bind(layer.module, paged)
        self._states = states if model.probe.mixers else None
        if self._states is not None:
            mixer_hook.bind_all(model.probe.mixers, self._states)

    @property
    def recorded_shapes(self) -> list[StepShape]:
        """The shapes of the steps that are replayed."""
        return self.recorded.shapes if self.recorded is not None else []

    def record_steps(self, scratch_blocks: Chunks[int], record: Recorder, progress: Progress) -> None:
        """Record steps and replay them from now on, if the attention can; ``scratch_blocks``, one of each layer group,
        take padding.

        Raises ``RuntimeError`` where the model does what cannot be recorded. ``recorded_shapes`` says what is replayed
        all the same: decodes, where only steps with prefill failed.
        """
        if not isinstance(self.attention, GraphAttention):
            return
        with torch.inference_mode():
            recorded = RecordedSteps(
                self._model,
                self.attention,
                self.info,
                scratch_blocks,
                record,
                self.sampled,
                self._states,
                self._long_rope,
            )
            try:
                recorded.capture(progress)
            finally:
                self.recorded = recorded if recorded.shapes else None

    def recorded_seconds(self) -> dict[StepShape, float]:
        """How long the device takes for each recorded shape: measured, in less than a second on a GPU."""
        with torch.inference_mode():
            return self.recorded.seconds() if self.recorded is not None else {}

    def forward(self, chunks: Chunks[ScheduledChunk]) -> torch.Tensor:
        """Logits in float32 on the model's device, one row for each chunk that samples: [rows, vocabulary].

        They are valid until the next call.
        """
        has_states, long_rope = self._states is not None, self._long_rope is not None
        batch = flatten(chunks, self.info.block_size, self._windows, states=has_states, long_rope=long_rope)
        return self.compute(batch)

    def compute(self, batch: FlatBatch) -> torch.Tensor:
        """``forward`` of a step that is laid out already, with all that it brings beside token ids.

        Raises ``ValueError`` where it does not say which tokens are of long texts, and the model has to know.
        """
        logits: torch.Tensor
        if self._long_rope is not None and batch.long_tokens is None:
            raise ValueError("the step has no long_tokens, by which this model is rotated; lay it out with long_rope")
        if self._is_short:
            # Only here nothing keeps the tensors of the step that failed: its error did.
            self._is_short = False
            release_idle(self._device)
        with torch.inference_mode():
            if self.recorded is not None and (shape := self.recorded.shape_of(batch)) is not None:
                logits = self.recorded.forward(batch, shape)
            else:
                self.attention.prepare(batch)
                if self._states is not None:
                    self._states.prepare(batch)
                tokens = self._on_device(batch.tokens)
                if min(batch.tokens, default=0) < 0:
                    tokens = known_ids(tokens, self.sampled)
                inputs = {"input_ids": tokens[None]}
                if batch.embeddings is not None:
                    rows, vectors = batch.embeddings
                    embedded = self._model.get_input_embeddings()(inputs.pop("input_ids"))
                    embedded[0, self._on_device(rows)] = vectors.to(embedded)
                    inputs["inputs_embeds"] = embedded
                # [1, tokens], or [axes, 1, tokens] as models take several.
                axes = batch.position_axes
                positions = (
                    self._on_device(batch.positions) if axes is None else torch.stack([*map(self._on_device, axes)])
                )
                rows_kept = self._on_device(batch.sample_rows)
                with self._rotating(batch):
                    output = self._model(
                        **inputs, position_ids=positions[..., None, :], use_cache=False, logits_to_keep=rows_kept
                    )
                logits = output.logits[0].float()
            if self._states is not None:
                self._states.keep(batch)
        return logits

    def shortage(self, error: BaseException) -> OutOfMemory | None:
        """What to say where memory ran out; then the next step begins with giving back what torch holds unused."""
        if not ran_out(error):
            return None
        self._is_short = True
        return step_ran_out(error, who_holds(self._device))

    def check(self) -> None:
        """Raises ``EngineUnavailable`` if the device is lost."""
        require_device(self._device)

    def _rotating(self, batch: FlatBatch) -> AbstractContextManager[None]:
        if self._long_rope is None or batch.long_tokens is None:
            return nullcontext()
        return self._long_rope.rotating(self._on_device(batch.long_tokens).bool())

    def _on_device(self, numbers: array[int]) -> torch.Tensor:
        if not numbers:
            return torch.empty(0, dtype=torch.long, device=self._device)
        staged = torch.frombuffer(numbers, dtype=torch.int32)
        if self._device.type == "cuda":
            staged = staged.pin_memory()  # from other memory torch waits until all that was launched is done
        return staged.to(self._device, non_blocking=True).long()
