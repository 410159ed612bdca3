"""Packed panels stand for exactly the weights that they were made from."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from support.panels import WIDTHS, Kernels, columns_of, gguf_type, random_blocks, weights_of

from engine.native import packing
from engine.native.packing import KINDS, Format, bytes_in_panels, pack_blocks, pack_floats

WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""The types that the gguf package can write."""
GRIDS = [kind for kind in KINDS if kind.startswith(("IQ1", "IQ2", "IQ3"))]
"""Those whose blocks say where in a grid several numbers are."""


@pytest.fixture(scope="module", params=WIDTHS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"), request.param)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_any_blocks_keep_their_numbers_bit_by_bit(kind: str, kernels: Kernels) -> None:
    columns = 3 * columns_of(kind)
    blocks = random_blocks(kind, 48, columns, notable=True)
    weights = weights_of(blocks, kind)
    assert weights.isfinite().all()
    assert same_bits(kernels.unpacked(pack_blocks(blocks, kind), columns), weights)


@pytest.mark.parametrize("kind", WRITTEN)
def test_written_blocks_keep_their_numbers(kind: str, kernels: Kernels) -> None:
    weight = np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quantize(weight, gguf_type(kind))).unflatten(1, (3, -1))
    assert same_bits(kernels.unpacked(pack_blocks(blocks, kind), 96), weights_of(blocks, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_stay_as_small_as_in_the_file(kind: str, kernels: Kernels) -> None:
    blocks = random_blocks(kind, 32, 512, notable=False)
    packed = pack_blocks(blocks, kind)
    size = bytes_in_panels(kind, blocks.shape[2])
    assert packed.data.numel() == blocks[..., 0].numel() * size
    assert size == blocks.shape[2] if kind not in GRIDS else size < 2.2 * blocks.shape[2]
    assert kernels.block_bytes(packed.format) * (512 // columns_of(kind)) == packed.data[0].numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_matrix_is_packed_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(kind, 80, 512, notable=False)
    whole = pack_blocks(blocks, kind)
    monkeypatch.setattr(packing, "BYTES_TOGETHER", 2 * blocks[:16].numel())
    assert torch.equal(pack_blocks(blocks, kind).data, whole.data)


def test_floats_are_bfloat16_only_where_nothing_is_lost(kernels: Kernels) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert pack_floats(weight).format is Format.FLOAT
    assert same_bits(kernels.unpacked(pack_floats(weight), 64), weight)
    short = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), gguf_type("BF16")), gguf_type("BF16")))
    assert pack_floats(short).format is Format.BRAIN
    assert same_bits(kernels.unpacked(pack_floats(short), 64), short)
    assert pack_floats(short).data.numel() * 2 == pack_floats(weight).data.numel()
