"""Files of random weights for measurements: Castor computes them in blocks, and llama.cpp finds the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fates import FastestModel
from support.gguf_converter import vocabulary, write_gguf
from support.llama_cpp import ask
from support.native import compile_once
from support.synthetic_gguf import KINDS, write_synthetic

from engine.gguf.header import read_header
from engine.gguf.prepare import prepare

pytestmark = pytest.mark.reference
code = pytest.fixture(autouse=True)(compile_once)

SMALLER: dict[str, dict[str, Any]] = {
    "moe": {"num_hidden_layers": 2, "num_experts": 16},
    "hybrid": {"num_hidden_layers": 4, "intermediate_size": 512},
}
PROMPT = [5, 9, 40, 77, 3, 120, 250, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_computed_as_llama_cpp_does(kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies to eight bits, which is about a hundredth of each number."""
    rows = {"token_embd.weight": (np.zeros((320, 32), np.float32), "F32")}
    tokenizer = write_gguf(tmp_path / "t.gguf", "llama", {}, rows, "smollm", (vocabulary(320), ["! !"]))
    path = write_synthetic(tmp_path / "m.gguf", kind, tokenizer, **SMALLER[kind])
    kinds = {tensor.kind for tensor in read_header(path).tensors.values() if len(tensor.shape) == 3}
    assert kinds == ({12, 14} if kind == "moe" else set())
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(path, folder)
    model = FastestModel(folder)
    assert model.is_native == (kind == "moe")
    ((first, *_),) = ask(path, 1, [PROMPT])
    (found,) = model.run([PROMPT], 64)
    expected, own = torch.tensor(first[1]), found[len(PROMPT) - 1].log_softmax(-1)
    assert own.argmax() == first[0]
    assert (own - expected).abs().mean() < 0.1 < expected.std()
