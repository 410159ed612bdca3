"""Blocks of random digits whose scales are numbers, as those of weights are."""

from __future__ import annotations

import torch

from engine.packed.published_schemes import PUBLISHED
from engine.packed.schemes import SCHEMES, Blocks, Scheme

ALL = {scheme.name: scheme for scheme in (*SCHEMES.values(), *PUBLISHED)}
# Where a block has the high bytes of its numbers in half precision.
_HIGH_BYTES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (1,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (1, 3)),
    "Q6_K": (209,),
}


def random_blocks(name: str, *shape: int, seed: int = 0, device: torch.device | None = None) -> Blocks:
    """Blocks of a scheme for numbers of a shape [..., rows, columns]: the same ones for the same arguments."""
    scheme, generator = ALL[name], torch.Generator(device or "cpu").manual_seed(seed)
    *rows, columns = shape
    size = (*rows, scheme.row_bytes(columns))
    data = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=device)
    _be_numbers(data.view(-1, scheme.block_bytes), scheme, generator)
    return Blocks(data, scheme)


def _be_numbers(blocks: torch.Tensor, scheme: Scheme, generator: torch.Generator) -> None:
    count, device = len(blocks), blocks.device
    small = torch.randint(0, 40, (count,), dtype=torch.uint8, generator=generator, device=device)
    for at in _HIGH_BYTES.get(scheme.name, ()):
        blocks[:, at] = small
    if scheme.name == "MXFP4":
        blocks[:, 0] = 117 + small % 10
    elif scheme.name not in _HIGH_BYTES:
        blocks[:, :4] = torch.randn(count, 1, generator=generator, device=device).view(torch.uint8)
    if scheme.name.startswith("I"):
        blocks[:, 4] = small
    if scheme.name == "NVFP4":
        blocks[:, 4:8] &= 0x4F
    if scheme.name.startswith("F8"):
        digits = blocks[:, 4:]
        digits[(digits & 127) == 127] = 3
