"""Recorded steps of our kernels on a CPU: "replaying" computes again from the same buffers, which must tell all."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.paged import BLOCK_SIZE, PagedModel, lively_model_folder, make_sequence
from support.recording import record

from engine.attention.triton_paged import TritonAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.flat_batch import EmbeddingRows, StepShape, flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence

LENGTHS = (5, 30, 1, 17, 64)
CONTEXT = 72  # so that the recorded steps with prefill are those of 16 and 64 tokens


def silent(_stage: str, _done: float) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return lively_model_folder(tmp_path_factory.mktemp("gemma2"), "gemma2", **config)


def prefilled(model: PagedModel) -> list[Sequence]:
    """Sequences whose prompts are computed and whose next token is known."""
    sequences = []
    for length in LENGTHS:
        tokens = [3 + (7 * i + length) % 250 for i in range(length + 4)]
        sequences.append(model.sequence(tokens, model.take_blocks(len(tokens))))
    model.runner.forward(
        [ScheduledChunk(sequence, 0, length) for sequence, length in zip(sequences, LENGTHS, strict=True)]
    )
    return sequences


def decodes(sequences: list[Sequence], step: int) -> list[ScheduledChunk]:
    chunks = []
    for sequence, length in zip(sequences, LENGTHS, strict=True):
        full = sequence.tokens
        sequence.tokens = full[: length + step + 1]
        chunks.append(ScheduledChunk(sequence, length + step, 1))
    return chunks


def test_a_padded_step_equals_the_step_itself(folder: Path) -> None:
    plain, recorded = (
        PagedModel(folder, TritonAttention, max_context=CONTEXT),
        PagedModel(folder, TritonAttention, max_context=CONTEXT),
    )
    scratch = recorded.take_scratch()
    plain.take_blocks(1)
    expected, found = prefilled(plain), prefilled(recorded)
    recorded.runner.record_steps(scratch, record, silent)
    texts = [list(sequence.tokens) for sequence in expected]
    for step, size in enumerate((5, 3, 1, 4)):
        for sequences in (expected, found):
            for sequence, text in zip(sequences, texts, strict=True):
                sequence.tokens = text
        chunks, others = decodes(expected, step), decodes(found, step)
        # The others of the step go alone, so that every later step finds its past in the blocks.
        for part in (slice(0, size), slice(size, None)):
            if chunks[part]:
                logits = recorded.runner.forward(others[part])
                torch.testing.assert_close(logits, plain.runner.forward(chunks[part]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_a_step_with_prefill_equals_the_step_itself(seed: int, folder: Path) -> None:
    """Decodes and chunks with and without a past, any of which may sample, padded to 16 or 64 tokens."""
    rnd = random.Random(seed)
    texts = [[3 + rnd.randrange(250) for _ in range(rnd.choice((2, 20, 60)))] for _ in range(6)]
    models = [PagedModel(folder, TritonAttention, max_context=CONTEXT) for _ in range(2)]
    scratch, _ = (model.take_scratch() for model in models)
    models[0].runner.record_steps(scratch, record, silent)
    pairs = [[model.sequence(text, model.take_blocks(len(text))) for model in models] for text in texts]
    done, sizes = [0] * len(texts), []
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        chunks: tuple[list[ScheduledChunk], ...] = ([], [])
        for number, (pair, text) in enumerate(zip(pairs, texts, strict=True)):
            room = 64 - sum(chunk.num_tokens for chunk in chunks[0])
            count = min(len(text) - done[number], rnd.choice((0, 1, 1, 9, 40)), room)
            known = done[number] + count if rnd.random() < 0.5 else len(text)
            for sequence, own in zip(pair, chunks, strict=True):
                sequence.tokens = text[:known]
                own.extend([ScheduledChunk(sequence, done[number], count)] * (count > 0))
            done[number] += count
        if chunks[0]:
            found, expected = (model.runner.forward(own) for model, own in zip(models, chunks, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
            sizes.append(sum(chunk.num_tokens for chunk in chunks[0]))
    assert any(size > 16 for size in sizes)


@pytest.mark.parametrize("with_prefill", [False, True])
def test_padding_writes_into_its_own_block_only(with_prefill: bool, folder: Path) -> None:
    model = PagedModel(folder, TritonAttention, max_context=CONTEXT)
    scratch = model.take_scratch()
    sequences = prefilled(model)
    cache = model.cache
    before = [blocks.clone() for blocks in (*cache.keys, *cache.values)]
    model.runner.record_steps(scratch, record, silent)
    chunks = decodes(sequences, 0)[:3]
    if with_prefill:
        new = model.sequence([7] * 5, model.take_blocks(5))
        chunks.append(ScheduledChunk(new, 0, 5))
    model.runner.forward(chunks)
    for blocks, past, group in zip((*cache.keys, *cache.values), before, cache.groups * 2, strict=True):
        taken = {
            chunk.sequence.tables[group][(chunk.start + i) // BLOCK_SIZE]
            for chunk in chunks
            for i in range(chunk.num_tokens)
        }
        changed = {int(block) for block in (blocks != past).flatten(1).any(1).nonzero()}
        assert changed <= taken | {scratch[group]}
        assert taken <= changed


def test_works_that_do_not_sample_have_no_row(folder: Path) -> None:
    model = PagedModel(folder, TritonAttention, max_context=CONTEXT)
    scratch = model.take_scratch()
    sequences = prefilled(model)
    model.runner.record_steps(scratch, record, silent)
    chunks = decodes(sequences, 0)
    both = model.runner.forward(chunks).clone()
    sequences[1].tokens.append(7)
    found = model.runner.forward(chunks)
    torch.testing.assert_close(found, both[[0, 2, 3, 4]])


def test_a_decode_of_more_than_text_is_not_replayed(folder: Path) -> None:
    """It is computed, with what it brings."""
    model = PagedModel(folder, TritonAttention, max_context=CONTEXT)
    scratch = model.take_scratch()
    sequences = prefilled(model)
    runner = model.runner
    assert isinstance(runner, ModelRunner)
    chunks, row = decodes(sequences, 0), array("i", [2])
    plain = runner.forward(chunks).clone()
    vectors = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    batch = flatten(chunks, BLOCK_SIZE, model.windows, embeddings=EmbeddingRows(row, vectors))
    expected = runner.compute(batch).clone()
    runner.record_steps(scratch, record, silent)
    torch.testing.assert_close(runner.compute(batch), expected)
    assert (expected[2] - plain[2]).abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="a recorded step cannot compute a step with embeddings"):
        batch.padded(StepShape(8, only_decodes=True), scratch, BLOCK_SIZE)


def test_the_buffers_hold_as_many_sequences_as_run_at_their_longest() -> None:
    cache = KVCache([KVShape(1, 16, 16)], 8, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    backend = TritonAttention(cache)
    pair = StepShape(2, only_decodes=True)
    backend.reserve([pair], 2, 3)
    longest = [ScheduledChunk(make_sequence([1] * 12, [3 * i, 3 * i + 1, 3 * i + 2]), 11, 1) for i in range(2)]
    for batch in (longest, longest[:1], []):
        backend.fill(flatten(batch, BLOCK_SIZE).padded(pair, [7], BLOCK_SIZE), pair)


def test_what_cannot_be_recorded_is_computed(folder: Path) -> None:
    def refuse(_compute: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = PagedModel(folder, TritonAttention, max_context=CONTEXT)
    sequences = prefilled(model)
    with pytest.raises(RuntimeError, match="capturing"):
        model.runner.record_steps(model.take_scratch(), refuse, silent)
    assert model.runner.forward(decodes(sequences, 0)).shape == (len(LENGTHS), 320)
