"""The kernels for weights in planes, compiled for devices that are not here: memory, registers, loads, products."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_blocks import random_blocks

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engine.packed_triton import kernels  # noqa: E402
from engine.packed_triton.planes import LAYOUTS, planes_of  # noqa: E402
from engine.packed_triton.tiles import TILES, UNPACKING  # noqa: E402

# What a program may have on compute capability 8.6 and 8.9, in bytes; larger devices allow more.
SHARED_MEMORY = 99 * 1024
PLANES = ("digits", "high", "scales", "fine", "more")
POINTERS = {torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
POINTERS |= {torch.float16: "*fp16", torch.float32: "*fp32"}
ROWS = {"out": "*bf16", "source": "*bf16", "slots": "*i64", "tiles": "*i32", "chosen": "*i64"}
# Those that differ in their numbers or their scales, few rows and many, one matrix and experts.
PRODUCTS = [("Q4_K", 0, 0), ("Q6_K", -1, 0), ("F8_128", -1, 0), ("MXFP4", 0, 4), ("I4_128", 0, 0)]


def compiled(kernel: Any, name: str, capability: int, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kernel for the planes of a scheme and rows in bfloat16, where all that may be is a multiple of 16."""
    planes = planes_of(random_blocks(name, 1, 512), torch.device("cpu"))
    assert planes is not None
    constants = {**LAYOUTS[name].constants, **constants}
    types = {**ROWS, **{key: POINTERS[plane.dtype] for key, plane in zip(PLANES, planes.tensors, strict=True)}}
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
    places = {key: (place,) for place, key in enumerate(kernel.arg_names)}
    varying = {*constants, *(kernel.do_not_specialize or ())}
    wide = {places[key]: [["tt.divisibility", 16]] for key in signature if key not in varying}
    source = ASTSource(kernel, signature, {places[key]: value for key, value in constants.items()}, wide)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(made: Any, folder: Path) -> dict[str, int]:
    """Registers and local memory of a thread."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    shown = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "size", "shared"), PRODUCTS)
def test_products(name: str, size: int, shared: int, capability: int, tmp_path: Path) -> None:
    tile = TILES[size]
    constants = {"ROWS": tile.rows, "CHANNELS": tile.channels, "GROUPS": tile.groups, "SHARED": shared}
    made = compiled(
        kernels.product_kernel, name, capability, constants, {"num_warps": tile.warps, "num_stages": tile.stages}
    )
    used = usage(made, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0), "registers are spilled"
    assert made.metadata.shared <= SHARED_MEMORY
    ptx = made.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    assert "cp.async.cg.shared.global" in ptx, "digits are read in pieces of less than 16 bytes"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["Q6_K", "NVFP4"])
def test_unpacking(name: str, capability: int, tmp_path: Path) -> None:
    constants = {key: value for key, value in UNPACKING.items() if key.isupper()}
    made = compiled(kernels.unpack_kernel, name, capability, {**constants, "CHOSEN": True}, {"num_warps": 4})
    used = usage(made, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0), "registers are spilled"
    assert "ld.global.v4.b32" in made.asm["ptx"].replace(".L1::evict_first", "")
    assert "st.global.v2.b32" in made.asm["ptx"], "numbers are written one by one"
