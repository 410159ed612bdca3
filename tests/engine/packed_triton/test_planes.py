"""Planes: as many bytes as the blocks, in one piece each, and where a digit lies."""

from __future__ import annotations

import pytest
import torch
from support.random_blocks import ALL, random_blocks

from engine.packed_triton import planes
from engine.packed_triton.planes import LAYOUTS, knows, planes_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", LAYOUTS)
def test_planes_take_the_bytes_of_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, 7, 512)
    whole = planes_of(blocks, CPU)
    assert whole is not None
    assert whole.nbytes == blocks.data.nbytes
    assert (whole.rows, whole.columns) == (7, 512)
    assert all(tensor.is_contiguous() and len(tensor) == 7 for tensor in whole.tensors)
    monkeypatch.setattr(planes, "CHUNK", 2 * 512)  # two rows at a time
    parts = planes_of(blocks, CPU)
    assert parts is not None
    assert all(torch.equal(one, other) for one, other in zip(whole.tensors, parts.tensors, strict=True))


def test_a_digit_is_where_its_column_says() -> None:
    blocks = random_blocks("Q4_0", 1, 64)
    found = planes_of(blocks, CPU)
    assert found is not None
    digits = (blocks.unpacked() / found.scales.float().repeat_interleave(32, dim=1)).round().long()[0] + 8
    for column in range(64):
        group, place, word = column // 32, column % 32 // 4, column % 4
        assert (int(found.digits[0, group, word]) >> (4 * place)) & 15 == digits[column]


def test_one_of_several_matrices_is_part_of_their_memory() -> None:
    stack = planes_of(random_blocks("Q6_K", 3, 4, 256), CPU)
    assert stack is not None
    second = stack.matrix(1, 4)
    assert (second.rows, second.columns) == (4, 256)
    assert second.scales.data_ptr() == stack.scales[4:].data_ptr()
    assert torch.equal(second.digits, stack.digits[4:8])


def test_what_is_known() -> None:
    assert knows(ALL["Q4_K"], (8, 256))
    assert knows(ALL["MXFP4"], (4, 8, 32))
    assert not knows(ALL["NF4"], (8, 256))
    assert not knows(ALL["Q4_K"], (256,))
    assert planes_of(random_blocks("NF4", 8, 64), CPU) is None


def test_what_would_be_computed_otherwise_is_not_known() -> None:
    huge = random_blocks("MXFP4", 2, 64)
    huge.data[0, 0] = 250
    assert planes_of(huge, CPU) is None
    no_number = random_blocks("F8_128", 2, 128)
    no_number.data[1, 60] = 255
    assert planes_of(no_number, CPU) is None
