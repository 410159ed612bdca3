"""From a batch of chunks to logits: one forward of the model over the tokens of all sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence as Batch

import torch

from engine.api.engine import ModelInfo
from engine.attention.base import AttentionBackend, GraphAttention
from engine.device.cuda_health import require_device
from engine.model import attention_hook
from engine.model.loader import LoadedModel, Progress
from engine.runner.cuda_graphs import DecodeGraphs, Recorder
from engine.scheduling.sequence import ScheduledChunk


class ModelRunner:
    """``engine.scheduling.contracts.Runner`` over a transformers model whose attention goes to ``attention``."""

    def __init__(self, model: LoadedModel, attention: AttentionBackend, info: ModelInfo) -> None:
        self.info = info
        self._model = model.module
        self.attention = attention
        self._device = torch.device(info.device)
        self._graphs: DecodeGraphs | None = None
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

    def forward(self, batch: Batch[ScheduledChunk]) -> torch.Tensor:
        """Logits in float32 on the model's device, one row for each chunk that samples: [rows, vocabulary].

        They are valid until the next call.
        """
        with torch.inference_mode():
            if self._graphs is not None and self._graphs.covers(batch):
                logits = self._graphs.forward(batch)
            else:
                logits = self._forward(batch)
            if not len(logits) and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        return logits

    def check(self) -> None:
        """Raises ``EngineUnavailable`` if the device is lost."""
        require_device(self._device)

    def _forward(self, batch: Batch[ScheduledChunk]) -> torch.Tensor:
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in batch:
            stop = chunk.start + chunk.num_tokens
            ids += chunk.sequence.tokens[chunk.start : stop]
            positions += range(chunk.start, stop)
            if chunk.samples:
                wanted.append(len(ids) - 1)
        self.attention.prepare(batch)
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self._device),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits
