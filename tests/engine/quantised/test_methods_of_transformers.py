"""What transformers itself unpacks at a load: the same numbers, from the same stored tensors."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import dequantize_convertops

from engine.packed.schemes import Blocks
from engine.quantised import method_of


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("high", "wide"), [(128, 128), (32, 64), (1, 32)])
def test_fp8(high: int, wide: int) -> None:
    weight = torch.randn(256, 128, generator=generator()).to(torch.float8_e4m3fn)
    scale = torch.rand(256 // high, 128 // wide, generator=generator())
    expected = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]
    found = method_of({"quant_method": "fp8", "weight_block_size": [high, wide]}).read(
        {"weight": weight, "scale": scale}
    )
    assert isinstance(found, Blocks)
    assert torch.equal(found.unpacked(), expected)


def test_mxfp4() -> None:
    """transformers turns experts round: [experts, columns, rows]."""
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8, generator=generator())
    scales = torch.randint(100, 150, (2, 8, 3), dtype=torch.uint8, generator=generator())
    expected = dequantize_convertops(blocks.clone(), scales.clone(), torch.float32)
    found = method_of({"quant_method": "mxfp4"}).read({"blocks": blocks, "scales": scales})
    assert isinstance(found, Blocks)
    assert torch.equal(found.unpacked(), expected.mT)
