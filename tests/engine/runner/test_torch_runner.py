"""What a step may bring beside token ids, against transformers' own forward with the same."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import BLOCK_SIZE, PagedModel, lively_model_folder, make_sequence, plain_logits, plain_model

from engine.api.block_groups import Window
from engine.runner import torch_runner
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.flat_batch import EmbeddingRows, flatten
from engine.scheduling.sequence import ScheduledChunk

TEXT = [3 + 7 * i % 250 for i in range(21)]
HYBRID: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
TOLERANCE = 1e-4


class ChunkedModel(PagedModel):
    """Computes ``TEXT`` in chunks, after a neighbour of one token."""

    runner: ModelRunner

    def chunks(self) -> list[list[ScheduledChunk]]:
        neighbour = self.sequence([9], self.take_blocks(1))
        sequence = self.sequence(TEXT, self.take_blocks(len(TEXT)))
        parts = [ScheduledChunk(sequence, start, min(8, len(TEXT) - start)) for start in range(0, len(TEXT), 8)]
        return [[ScheduledChunk(neighbour, 0, 1), part] for part in parts]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_vectors_take_the_place_of_embeddings(family: str, tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path, family, **(HYBRID if family == "gemma2" else {}))
    plain, paged = plain_model(folder), ChunkedModel(folder)
    image = range(5, 18)
    vectors = torch.randn(len(TEXT), 64, generator=torch.Generator().manual_seed(1))
    embedded = plain.get_input_embeddings()(torch.tensor([TEXT])).detach()
    embedded[0, image] = vectors[image]
    with torch.inference_mode():
        expected = plain(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    for chunks in paged.chunks():
        begin, count = chunks[1].start, chunks[1].num_tokens
        own = [place for place in image if begin <= place < begin + count]
        rows = EmbeddingRows(array("i", [1 + place - begin for place in own]), vectors[own])
        logits = paged.runner.compute(flatten(chunks, BLOCK_SIZE, paged.windows, embeddings=rows))
    assert (logits[-1] - expected).abs().max() < TOLERANCE
    assert (logits[-1] - plain_logits(plain, TEXT)[-1]).abs().max() > 0.1


def test_positions_of_several_axes(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    folder = lively_model_folder(
        tmp_path, "cohere_compass_text", **HYBRID, rope_parameters=dict.fromkeys(set(HYBRID["layer_types"]), rope)
    )
    plain, paged = plain_model(folder), ChunkedModel(folder)
    axes = [[i if i < 4 else 4 + (i - 4) // step % 5 for i in range(len(TEXT))] for step in (100, 4, 1)]
    with torch.inference_mode():
        expected = plain(
            input_ids=torch.tensor([TEXT]), position_ids=torch.tensor(axes)[:, None], use_cache=False
        ).logits[0, -1]
    for chunks in paged.chunks():
        own = slice(chunks[1].start, chunks[1].start + chunks[1].num_tokens)
        positions = tuple(array("i", [0, *axis[own]]) for axis in axes)
        logits = paged.runner.compute(flatten(chunks, BLOCK_SIZE, paged.windows, position_axes=positions))
    assert (logits[-1] - expected).abs().max() < TOLERANCE
    assert (logits[-1] - plain_logits(plain, TEXT)[-1]).abs().max() > 0.1


def test_each_layer_group_reads_and_writes_by_its_own_table(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path, "gemma2", **HYBRID)
    paged = ChunkedModel(folder)
    assert paged.windows == [None, Window(8)]
    steps = paged.chunks()
    sequences = [chunk.sequence for chunk in steps[0]]
    owned = [{block for sequence in sequences for block in sequence.tables[group]} for group in range(2)]
    assert owned[0] != owned[1]
    for chunks in steps:
        paged.spoil_what_is_passed(sequences[1], chunks[1].start)
        logits = paged.runner.forward(chunks)
    assert (logits[-1] - plain_logits(plain_model(folder), TEXT)[-1]).abs().max() < TOLERANCE
    for layer, group in enumerate(paged.cache.groups):
        for blocks in (paged.cache.keys[layer], paged.cache.values[layer]):
            assert {int(number) for number in (blocks != paged.STALE).flatten(1).any(1).nonzero()} <= owned[group]


def test_what_torch_holds_unused_is_given_back_once_the_step_that_did_not_fit_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr(torch_runner, "release_idle", released.append)
    paged = PagedModel(lively_model_folder(tmp_path, "llama", num_hidden_layers=1))
    chunk = ScheduledChunk(make_sequence([5, 6], [0]), 0, 2)
    before = paged.runner.forward([chunk]).clone()
    assert paged.runner.shortage(ValueError("another reason")) is None
    shortage = paged.runner.shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert str(shortage).startswith("Memory ran out while this request was computed: 2.00 GiB were wanted; of ")
    assert released == []
    for _ in range(2):
        assert torch.equal(paged.runner.forward([chunk]), before)
    assert released == [torch.device("cpu")]
