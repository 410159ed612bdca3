"""Where the blocks of a GGUF file stay, and what that takes on each device."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from support.gguf_converter import converted, quantised, write_gguf
from support.gguf_families import FAMILIES

from engine.api.engine import EngineConfig
from engine.gguf.header import Header, read_header
from engine.packed import folder
from engine.packed.folder import GgufFile, room_problem, stay_in_blocks
from engine.packed.places import Target

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = EngineConfig(path="")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    family = FAMILIES["llama"]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    data = quantised(tensors, {"attn|embd|output": "Q8_0", "ffn": "Q4_0"})
    return read_header(write_gguf(tmp_path_factory.mktemp("file") / "m.gguf", family.architecture, keys, data))


def test_the_type_decides() -> None:
    has_triton = find_spec("triton") is not None
    on_a_cpu = [stay_in_blocks(CONFIG, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert on_a_cpu == [True, False]
    on_a_gpu = [stay_in_blocks(CONFIG, GPU, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert on_a_gpu == [has_triton, has_triton, False]


def test_what_is_no_block_is_of_the_type(header: Header) -> None:
    plain = sum(tensor.elements for tensor in header.tensors.values() if len(tensor.shape) == 1)
    on_a_cpu = GgufFile(header, None).bytes_in_blocks()
    assert plain > 0
    assert on_a_cpu - GgufFile(header, None).bytes_in_blocks(Target(GPU, torch.bfloat16)) == 2 * plain
    whole = sum(tensor.elements for tensor in header.tensors.values())
    assert on_a_cpu < 2 * whole


def test_a_file_that_fits_in_blocks_only_fits_on_a_gpu(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(tensor.elements for tensor in header.tensors.values())
    room = GgufFile(header, None).bytes_in_blocks(Target(GPU, torch.bfloat16))
    assert room < 2 * whole
    monkeypatch.setattr(folder, "find_spec", lambda _: object())
    assert room_problem(GgufFile(header, None), "it", whole, CONFIG, torch.bfloat16, GPU, room) is None
