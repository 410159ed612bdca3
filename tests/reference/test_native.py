"""The native forward equals a plain float32 forward, whatever the weights are packed as and the processor can do."""

from __future__ import annotations

import weakref
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native import BLOCK_SIZE, TARGETS, NativeModel, assert_equal, compile_for, compile_once
from support.paged import TOLERANCE, lively_model_folder, make_sequence, plain_logits, plain_model, texts

from engine.api.block_groups import Window
from engine.api.engine import EngineConfig
from engine.api.events import Delta, RequestFinished
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.cache.kv_tensors import KVCache
from engine.model.loader import LoadedModel, load_model
from engine.native import packing
from engine.native.decoder import require_known
from engine.native.errors import DifferentNumbers, NotNative, WeightsGone
from engine.scheduling.flat_batch import EmbeddingRows, flatten
from engine.scheduling.sequence import ScheduledChunk
from engine.weights.usable import GGUF_LINK

pytestmark = pytest.mark.reference

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, norms of heads": ("qwen3", {}),
    "mistral, a window": ("mistral", {"sliding_window": 8}),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "one head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}),
    "three queries for a key": ("llama", {"num_attention_heads": 6, "hidden_size": 192}),
    "nine queries for a key": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 288},
    ),
    "large heads": ("llama", {"head_dim": 80}),
    "an odd vocabulary": ("llama", {"vocab_size": 336}),
    "shared embedding": ("llama", {"tie_word_embeddings": True}),
    "scaled positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}
# Queries grow from position 64 on.
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
NOT_NATIVE: dict[str, dict[str, Any]] = {
    "olmo": {},
    "ministral3": {"rope_parameters": GROWING},
    "starcoder2": {},
    "gpt2": {},
}


code = pytest.fixture(autouse=True)(compile_once)
target = pytest.fixture(params=TARGETS)(compile_for)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mixture_of_chunks_equals_a_plain_forward(shape: str, tmp_path: Path) -> None:
    family, config = SHAPES[shape]
    assert_equal(lively_model_folder(tmp_path / "model", family, **config), texts(37, 5, 19))


def test_many_sequences_and_long_ones(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path / "model", "llama")
    assert_equal(folder, texts(*([300] + [3, 17, 33, 48] * 6)), chunks=(40, 200))


@pytest.mark.parametrize("packed", ["Q4_0", "Q4_1", "Q8_0", "bfloat16", "mixed"])
def test_packed_weights_are_the_same_weights(packed: str, target: str, tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path / "model", "llama", tie_word_embeddings=packed == "Q4_0")
    repack(folder, packed)
    assert_equal(folder, texts(37, 5, 19, 4, 4, 4, 4, 4, 4), chunks=(2, 64))


def repack(folder: Path, packed: str) -> None:
    """Round the weights of a folder to what a format holds; ``mixed`` gives each weight another one."""
    kinds = ["Q4_0", "Q4_1", "Q8_0", "bfloat16"] if packed == "mixed" else [packed]
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(folder / GGUF_LINK, "llama")
    for number, (name, weight) in enumerate(sorted(weights.items())):
        kind = kinds[number % len(kinds)]
        if kind == "bfloat16":
            weights[name] = weight.bfloat16().float()
        elif "proj" in name or "lm_head" in name or "embed" in name:
            data = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
            weights[name] = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
            add_tensor(writer, name, data, gguf.GGMLQuantizationType[kind])
            continue
        add_tensor(writer, name, weights[name].numpy())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType | None = None
) -> None:
    """A weight as llama.cpp's converter names it, the halves of the heads of queries and keys interleaved."""
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 99).get_name(name, try_suffixes=(".weight", ".bias"))
    heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(named.split(".", 2)[-1])
    if heads is not None:
        data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    writer.add_tensor(named, np.ascontiguousarray(data), raw_dtype=kind)


@pytest.mark.parametrize("shape", ["llama", "mistral, a window", "three queries for a key", "nine queries for a key"])
def test_neighbours_change_nothing_at_all(shape: str, target: str, tmp_path: Path) -> None:
    """Alone, in a batch and in other chunks: the very same logits."""
    family, config = SHAPES[shape]
    folder = lively_model_folder(tmp_path / "model", family, **config)
    repack(folder, "Q4_1")
    native = NativeModel(folder)
    compared = texts(37, 5, 19, 30, 30)
    alone = [native.run([text], 30)[0] for text in compared]
    for chunk in (9, 4):
        for found, other in zip(native.run(compared, chunk), alone, strict=True):
            assert found.keys() & other.keys()
            for index in found.keys() & other.keys():
                assert torch.equal(found[index], other[index])


@pytest.mark.parametrize("family", NOT_NATIVE)
def test_other_models_are_left_to_torch(family: str, tmp_path: Path) -> None:
    """It is known before the weights are packed, so that they are not loaded twice at each start."""
    with pytest.raises(NotNative) as refusal:
        NativeModel(lively_model_folder(tmp_path / "model", family, **NOT_NATIVE[family]))
    assert not isinstance(refusal.value, WeightsGone)
    assert "Error: " not in str(refusal.value), "nobody foresaw it"


def test_queries_that_grow_far_away_are_seen(tmp_path: Path) -> None:
    """Where the context ends before they do, the model is like the others."""
    folder = lively_model_folder(tmp_path / "model", "ministral3", rope_parameters=GROWING)
    with pytest.raises(NotNative, match=r"q_proj of .* differs from the formula"):
        NativeModel(folder)
    grown = {**GROWING, "original_max_position_embeddings": 512}
    assert_equal(lively_model_folder(tmp_path / "other", "ministral3", rope_parameters=grown), texts(300), (64,))


def test_wrong_numbers_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lively_model_folder(tmp_path / "model", "llama")
    monkeypatch.setattr("engine.native.decoder.pack_floats", lambda weight: packing.pack_floats(weight * 1.01))
    with pytest.raises(DifferentNumbers, match="differ from the model's own"):
        NativeModel(folder)


@pytest.mark.parametrize("other", ["o_proj", "down_proj", "up_proj", "q_proj"])
def test_a_layer_of_another_size_is_left_to_torch(other: str, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        (part,) = (x for name, x in module.model.layers[2].named_modules() if name.endswith(other))
        part.out_features += 32

    with pytest.raises(NotNative, match=r"; 64 to \d+ are expected|; 96 to \d+ are expected"):
        NativeModel(lively_model_folder(tmp_path / "model", "llama"), change=change)


def test_steps_beyond_the_cache_are_errors(tmp_path: Path) -> None:
    native = NativeModel(lively_model_folder(tmp_path / "model", "llama"))
    tokens = texts(40)[0]
    for blocks, start in (([0, 1, 256], 0), ([0, -1, 2], 0), ([0, 1], 0), ([0] * 40, 500)):
        with pytest.raises(IndexError, match="a step reaches beyond"):
            native.runner.forward([ScheduledChunk(make_sequence([3] * start + tokens, blocks), start, len(tokens))])
    assert len(native.runner.forward([ScheduledChunk(make_sequence(tokens, [0, 1, 255]), 0, len(tokens))])) == 1


def test_tokens_beyond_the_vocabulary_are_errors(tmp_path: Path) -> None:
    native = NativeModel(lively_model_folder(tmp_path / "model", "llama", vocab_size=330))
    for token in (330, -1):
        with pytest.raises(IndexError, match="tokens that are not in the vocabulary"):
            native.runner.forward([ScheduledChunk(make_sequence([3, token], [0]), 0, 2)])


@pytest.mark.parametrize("is_tied", [True, False])
def test_no_weights_are_held_twice(is_tied: bool, tmp_path: Path) -> None:
    modules = []
    NativeModel(lively_model_folder(tmp_path / "model", "llama", tie_word_embeddings=is_tied), change=modules.append)
    assert {weight.numel() for weight in modules[0].parameters() if weight.ndim != 1} == set()
    assert max(weight.numel() for weight in modules[0].parameters()) == 64


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("gemma3_text", {}), ("granite", {"embedding_multiplier": 3.0})]
)
def test_vectors_take_the_place_of_embeddings(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """A model that scales what it looks up takes vectors as they are; one that scales all first states scales them."""
    folder = lively_model_folder(tmp_path / "model", family, **config)
    plain, native = plain_model(folder), NativeModel(folder)
    (text,) = texts(21)
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    embedded = plain.get_input_embeddings()(torch.tensor([text])).detach()
    embedded[0, [4, 5, 20]] = vectors
    with torch.inference_mode():
        expected = plain(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    chunks = [ScheduledChunk(make_sequence(text, native.take_blocks(21)), 0, 21)]
    rows = EmbeddingRows(array("i", [4, 5, 20]), vectors)
    found = torch.from_numpy(native.runner.compute(flatten(chunks, BLOCK_SIZE, embeddings=rows))[0])
    assert (found - expected).abs().max() < TOLERANCE
    assert (found - plain_logits(plain, text)[-1]).abs().max() > 0.1


def test_what_the_code_does_not_compute_is_refused(tmp_path: Path) -> None:
    native = NativeModel(lively_model_folder(tmp_path / "model", "llama"))
    chunks = [ScheduledChunk(make_sequence([3, 4], [0]), 0, 2)]
    limits, axes = array("i", [2, 2]), (array("i", [0, 1]),) * 3
    with pytest.raises(NotImplementedError, match="the native forward cannot compute a step with key_limits"):
        native.runner.compute(flatten(chunks, BLOCK_SIZE, key_limits=limits))
    with pytest.raises(NotImplementedError, match="the native forward cannot compute a step with position_axes"):
        native.runner.compute(flatten(chunks, BLOCK_SIZE, position_axes=axes))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 40,
}


def test_texts_that_are_rotated_in_two_ways_are_left_to_torch(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path / "model", "llama", rope_parameters=LONGROPE)
    with pytest.raises(NotNative, match=r"beyond 40 tokens .*\(longrope\), .* a max_context of 40 leaves it one"):
        NativeModel(folder)
    within, plain = NativeModel(folder, max_context=40), plain_model(folder)
    for text, found in zip(texts(40, 7), within.run(texts(40, 7)), strict=True):
        assert max((row - plain_logits(plain, text)[i]).abs().max() for i, row in found.items()) < TOLERANCE
    chunk = ScheduledChunk(make_sequence([3, 4], [0]), 0, 2)
    with pytest.raises(NotImplementedError, match="the native forward cannot compute a step with long_tokens"):
        within.runner.compute(flatten([chunk], BLOCK_SIZE, long_rope=True))


def test_chunks_and_shared_keys_are_left_to_torch(tmp_path: Path) -> None:
    loaded = load_model(EngineConfig(str(lively_model_folder(tmp_path / "model", "llama"))), lambda stage, done: None)
    cache = KVCache(loaded.probe.shapes, 1, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    first, *others = loaded.probe.layers
    with pytest.raises(NotNative, match="its layers attend in chunks"):
        require_known(loaded.module, [replace(first, window=Window(8, chunked=True)), *others], cache)
    with pytest.raises(NotNative, match="attend to the keys and values of others"):
        require_known(loaded.module, [first, *(replace(layer, writes=False) for layer in others)], cache)


def test_blocks_of_another_size_are_left_to_torch(tmp_path: Path) -> None:
    with pytest.raises(NotNative, match="blocks hold 8 tokens"):
        NativeModel(lively_model_folder(tmp_path / "model", "llama"), block_size=8)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo", "granite", "ministral3"])
def test_an_engine_answers_the_same_with_and_without(family: str, tmp_path: Path) -> None:
    """Whether it is native or not known."""
    folder = lively_model_folder(tmp_path / "model", family, **NOT_NATIVE.get(family, {}))
    answers = [answer(folder, native=native) for native in (True, False)]
    assert answers[0] == answers[1]
    assert answers[0]


def test_an_engine_without_threads_answers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights are packed already then, and gone before the model is loaded again: both might not fit."""
    folder = lively_model_folder(tmp_path / "model", "llama")
    packed, whole = [], []

    def keep(weight: torch.Tensor) -> packing.Panels:
        panels = packing.pack_floats(weight)
        packed.append(weakref.ref(panels.data))
        return panels

    def load(config: EngineConfig, progress: Any) -> LoadedModel:
        assert all(reference() is None for reference in (*packed, *whole))
        model = load_model(config, progress)
        whole.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr("engine.native.decoder.pack_floats", keep)
    monkeypatch.setattr("engine.model.loader.load_model", load)
    monkeypatch.setattr("engine.native.build.NativeRunner", refuse)
    found = answer(folder, native=True)
    assert len(whole) == 2
    assert packed
    assert "not natively: MemoryError: there are no threads" in caplog.text
    monkeypatch.undo()
    assert found == answer(folder, native=False)


def refuse(*_: object) -> None:
    raise MemoryError("there are no threads")


def answer(folder: Path, native: bool) -> list[tuple[int, ...]]:
    config = EngineConfig(path=str(folder), device="cpu", native=native, kv_memory=4e6, threads=2)
    core = build_core(config, lambda stage, done: None)
    core.submit(Request("r", tuple(texts(20)[0]), SamplingParams(max_tokens=20, temperature=0.0)))
    events = []
    while core.has_work:
        events += [event for told in core.step() for event in told]
    assert isinstance(events[-1], RequestFinished)
    assert events[-1].error is None
    return [event.token_ids for event in events if isinstance(event, Delta)]
