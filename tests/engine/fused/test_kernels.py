"""The kernels between the products of a layer, compiled for devices that are not here: registers, spills, loads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engine.fused import kernels  # noqa: E402


class Variant(NamedTuple):
    """A kernel with its constants, as it is launched, and the registers that a thread may use."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    registers: int


NORM = {"OFFSET": 0.0, "ROUND_FIRST": True}
ADD_NORM = {**NORM, "SCALE": 1.0, "DELTA_NORM": False, "DELTA_OFFSET": 0.0, "DELTA_ROUND_FIRST": True}
HEADS = {"HEADS": 32, "OTHER_HEADS": 8, "SIZE": 128, "WIDTH": 128, **NORM, "NORMED": False}
VARIANTS: dict[str, Variant] = {
    "norm, 4096": Variant(kernels.norm_kernel, {"SIZE": 4096, "WIDTH": 4096, **NORM}, 8, 64),
    "norm, 5120": Variant(kernels.norm_kernel, {"SIZE": 5120, "WIDTH": 8192, **NORM}, 8, 128),
    "add, norm, 4096": Variant(kernels.add_norm_kernel, {"SIZE": 4096, "WIDTH": 4096, **ADD_NORM}, 8, 64),
    "norm, add, norm, 5376": Variant(
        kernels.add_norm_kernel, {"SIZE": 5376, "WIDTH": 8192, **ADD_NORM, "DELTA_NORM": True, "SCALE": 0.22}, 8, 128
    ),
    "rotate": Variant(kernels.rotate_kernel, {**HEADS, "ANGLES": 128}, 1, 64),
    "norm, rotate": Variant(kernels.rotate_kernel, {**HEADS, "ANGLES": 128, **NORM, "NORMED": True}, 1, 64),
    "rotate, angles of half a head": Variant(kernels.rotate_kernel, {**HEADS, "ANGLES": 64}, 1, 64),
    **{
        name: Variant(kernels.activate_kernel, {"SIZE": 14336, "BLOCK": 1024, "ACTIVATION": name}, 4, 40)
        for name in kernels.ACTIVATIONS
    },
    **{
        f"{rows} rows, biased {biased}, whole {whole}": Variant(
            kernels.few_rows_kernel,
            {"ROWS": rows, "OUTPUTS": outputs, "BLOCK": 1024, "WHOLE": whole, "BIASED": biased},
            4,
            128,
        )
        for rows, outputs in ((1, 4), (2, 4), (4, 2))
        for biased in (False, True)
        for whole in (False, True)
    },
}  # fmt: skip
NUMBERS = {"eps": "fp32", "delta_eps": "fp32", "inner": "i32", "inputs": "i32", "outputs": "i32"}


def compiled(variant: Variant, capability: int) -> Any:
    """The kernel for bfloat16, all pointers and strides known to be multiples of 16."""
    kernel, signature = variant.kernel, {}
    for name in kernel.arg_names:
        plain = "i32" if name.endswith("_stride") else "*bf16"
        signature[name] = "constexpr" if name in variant.constants else NUMBERS.get(name, plain)
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    wide = {places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind in ("i32", "*bf16")}
    wide.pop(places.get("inner", ()), None)
    source = ASTSource(kernel, signature, {places[name]: value for name, value in variant.constants.items()}, wide)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": variant.warps})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", VARIANTS)
def test_registers_spills_and_loads(name: str, capability: int, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    made = compiled(variant, capability)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["REG"] <= variant.registers
    assert (used["STACK"], used["LOCAL"]) == (0, 0), "registers are spilled"
    assert made.metadata.shared <= 1024
    assert "ld.global.b16" not in made.asm["ptx"], "numbers are loaded one by one"
