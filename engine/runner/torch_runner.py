"""From a batch of chunks to logits: one forward of the model over the tokens of all sequences, laid end to end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Chunks

import torch

from engine.api.engine import ModelInfo
from engine.api.errors import OutOfMemory
from engine.attention.base import AttentionBackend, GraphAttention
from engine.cache.layout import num_groups
from engine.device.cuda_health import require_device
from engine.device.device_memory import ran_out, release_idle, step_ran_out
from engine.model import attention_hook
from engine.model.loader import LoadedModel, Progress
from engine.runner.cuda_graphs import DecodeGraphs, Recorder
from engine.scheduling.flat_batch import FlatBatch, flatten
from engine.scheduling.sequence import ScheduledChunk


class ModelRunner:
    """``engine.scheduling.contracts.Runner`` over a transformers model whose attention goes to ``attention``."""

    def __init__(self, model: LoadedModel, attention: AttentionBackend, info: ModelInfo) -> None:
        self.info = info
        self._model = model.module
        self.attention = attention
        self._device = torch.device(info.device)
        self._num_groups = num_groups(layer.shape for layer in model.probe.layers)
        self._graphs: DecodeGraphs | None = None
        self._is_short = False  # a step has just failed for want of memory
        for index, layer in enumerate(model.probe.layers):
            attention_hook.bind(layer.module, attention_hook.PagedLayer(attention, index))

    @property
    def replays(self) -> bool:
        """Whether decode steps are replayed."""
        return self._graphs is not None

    def record_decodes(self, scratch_block: int, record: Recorder, progress: Progress) -> None:
        """Record steps of decodes and replay them from now on, if the attention can; ``scratch_block`` takes padding.

        Raises ``RuntimeError`` where the model does what cannot be recorded; then nothing has changed.
        """
        if not isinstance(self.attention, GraphAttention):
            return
        with torch.inference_mode():
            graphs = DecodeGraphs(self._model, self.attention, self.info, scratch_block, record)
            graphs.capture(progress)
        self._graphs = graphs

    def forward(self, chunks: Chunks[ScheduledChunk]) -> torch.Tensor:
        """Logits in float32 on the model's device, one row for each chunk that samples: [rows, vocabulary].

        They are valid until the next call.
        """
        return self.compute(flatten(chunks, self.info.block_size, self._num_groups))

    def compute(self, batch: FlatBatch) -> torch.Tensor:
        """``forward`` of a step that is laid out already, with all that it brings beside token ids."""
        logits: torch.Tensor
        if self._is_short:
            # Only here nothing keeps the tensors of the step that failed: its error did.
            self._is_short = False
            release_idle(self._device)
        with torch.inference_mode():
            if self._graphs is not None and self._graphs.covers(batch):
                logits = self._graphs.forward(batch)
            else:
                self.attention.prepare(batch)
                inputs = {"input_ids": self._on_device(batch.tokens)[None]}
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
                output = self._model(
                    **inputs, position_ids=positions[..., None, :], use_cache=False, logits_to_keep=rows_kept
                )
                logits = output.logits[0].float()
            if not len(logits) and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        return logits

    def shortage(self, error: BaseException) -> OutOfMemory | None:
        """What to say where memory ran out; then the next step begins with giving back what torch holds unused."""
        if not ran_out(error):
            return None
        self._is_short = True
        return step_ran_out(error, self._device)

    def check(self) -> None:
        """Raises ``EngineUnavailable`` if the device is lost."""
        require_device(self._device)

    def _on_device(self, numbers: array[int]) -> torch.Tensor:
        if not numbers:
            return torch.empty(0, dtype=torch.long, device=self._device)
        return torch.frombuffer(numbers, dtype=torch.int32).to(self._device, torch.long)
