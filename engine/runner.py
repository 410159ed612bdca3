"""From a batch of works to logits: one forward of the model over the tokens of all sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence as Batch

import torch

from engine.attention import seam
from engine.attention.base import AttentionBackend
from engine.batch import Work
from engine.model import LoadedModel
from engine.types import ModelInfo


class ModelRunner:
    """``engine.batch.Runner`` over a transformers model whose attention goes to ``attention``."""

    def __init__(self, model: LoadedModel, attention: AttentionBackend, info: ModelInfo) -> None:
        self.info = info
        self._model = model.module
        self._attention = attention
        self._device = torch.device(info.device)
        for index, layer in enumerate(model.probe.layers):
            seam.bind(layer.module, seam.PagedLayer(attention, index))

    def forward(self, batch: Batch[Work]) -> torch.Tensor:
        """Logits in float32 on the model's device, one row for each work that samples: [rows, vocabulary]."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for work in batch:
            stop = work.start + work.num_tokens
            ids += work.sequence.tokens[work.start : stop]
            positions += range(work.start, stop)
            if work.samples:
                wanted.append(len(ids) - 1)
        with torch.inference_mode():
            self._attention.prepare(batch)
            output = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self._device),
            )
            logits: torch.Tensor = output.logits[0].float()
        return logits
