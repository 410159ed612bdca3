"""The Triton kernels without a GPU: interpreted against the reference, and compiled for the devices that matter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engine.attention import triton_kernels, triton_write  # noqa: E402
from engine.attention.base import AttentionOptions  # noqa: E402
from engine.attention.triton_launch import decode_options, prefill_options, write_options  # noqa: E402
from engine.attention.triton_paged import _steadily_strided  # noqa: E402
from engine.cache.layout import KVShape  # noqa: E402
from engine.fused import kernels as fused_kernels  # noqa: E402

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))
# The longest alone, so that several workers share the work, and what imports a library that transformers would use in
# all later tests; the others in one process, which imports torch once.
ALONE = ("test_attention", "test_flash_chunks", "test_gpu", "test_graphs", "test_packed_matrices")
INTERPRETED = {name.removeprefix("test_"): [path for path in FILES if path.stem == name] for name in ALONE}
INTERPRETED["others"] = [path for path in FILES if path.stem not in ALONE]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", INTERPRETED)
def test_interpreted(group: str) -> None:
    assert INTERPRETED[group]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, "-o", "timeout=1700", *map(str, INTERPRETED[group])],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1750,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# What a program may have on compute capability 8.6 and 8.9, in bytes (CUDA C++ Programming Guide, technical
# specifications per compute capability); larger devices allow more.
SHARED_MEMORY = 99 * 1024
# Bytes of local memory that a thread may use, by compute capability: prefill with heads of 128 needs more than 255
# registers where products take their operands from registers, by Triton 3.6 and 3.9 alike.
SPILLED = {80: 72, 90: 0}
# With fp8 products take one operand from registers on every device: wide heads with a soft cap need a few more there.
FP8_SPILLED = {89: 64, 90: 64}
# Decodes of which four programs must fit the 65,536 registers of a processor: they hide each other's waiting.
FOUR_PROGRAMS = {(90, "llama-3.1-8b", False), (90, "gpt-oss-20b", False), (90, "no power of two", False)}
FOUR_PROGRAMS |= {(90, "llama-3.1-8b", True), (90, "gpt-oss-20b", True)}
PLAIN = AttentionOptions(0.1)
SINKS = torch.zeros(64)
LAYERS = {
    "llama-3.1-8b": (32, KVShape(8, 128, 128), PLAIN),
    "gemma-2-9b": (16, KVShape(8, 256, 256), AttentionOptions(0.1, sliding_window=4096, softcap=50.0)),
    "gpt-oss-20b": (64, KVShape(8, 64, 64), AttentionOptions(0.1, sliding_window=128, sinks=SINKS)),
    "head size 512": (8, KVShape(1, 512, 512), PLAIN),
    "no power of two": (32, KVShape(32, 80, 80), PLAIN),
    "keys unlike values": (16, KVShape(16, 192, 128), PLAIN),
    "one head of keys for all": (64, KVShape(1, 128, 128), PLAIN),
    "one wide head of keys for all": (64, KVShape(1, 256, 256), PLAIN),
    "glm-4.7-flash": (20, KVShape(1, 576, 512, values_in_keys=True), PLAIN),
    "deepseek-v3": (128, KVShape(1, 576, 512, values_in_keys=True), PLAIN),
    "minicpm3-4b": (40, KVShape(1, 288, 256, values_in_keys=True), PLAIN),
}
DEVICES = ((80, False), (89, True), (90, False), (90, True))
# A compilation takes seconds: the layers that most models have for every device, the others for two that differ most.
MOST_USED = ("llama-3.1-8b", "gemma-2-9b", "gpt-oss-20b", "head size 512", "glm-4.7-flash")
COMPILED = [
    (name, capability, fp8)
    for name in LAYERS
    for capability, fp8 in DEVICES
    if name in MOST_USED or (capability, fp8) in DEVICES[::3] or (capability, name, fp8) in FOUR_PROGRAMS
]
STRIDES = ("token_stride", "head_stride", "value_token_stride", "value_head_stride", "outer_stride", "inner_stride")
OTHER_STRIDES = ("other_token_stride", "other_head_stride")
INTEGERS = dict.fromkeys(("index", "counters"), "*i32") | dict.fromkeys(("key_scales", "value_scales"), "*u8")
TYPES = {**INTEGERS, **dict.fromkeys(("scaling", "softcap", "eps"), "fp32"), "partial": "*fp32", "stats": "*fp32"}
PLAIN_HEADS = {"NORMED": False, "OFFSET": 0.0, "ROUND_FIRST": False}


@pytest.mark.parametrize(("name", "capability", "fp8"), COMPILED)
def test_compiles_into_the_memory_of_a_device(name: str, capability: int, fp8: bool) -> None:
    heads, shape, options = LAYERS[name]
    layer = (shape, heads, torch.bfloat16, 16, options)
    kernels = {
        triton_write.write_kernel: write_options(shape, 16, fp8=fp8),
        triton_kernels.decode_kernel: decode_options(*layer, fp8=fp8),
        triton_kernels.prefill_kernel: prefill_options(*layer, fp8=fp8),
    }
    for kernel, constants in kernels.items():
        made = compiled(kernel, constants, "*bf16", capability, wide=True)
        assert made.metadata.shared <= SHARED_MEMORY, kernel.__name__
        registers, spilled = register_usage(made)
        assert spilled <= (FP8_SPILLED if fp8 else SPILLED)[capability], kernel.__name__
        assert spilled == 0 or kernel is triton_kernels.prefill_kernel
        if kernel is triton_kernels.decode_kernel and (capability, name, fp8) in FOUR_PROGRAMS:
            assert registers <= 128


@pytest.mark.parametrize("capability", [80, 90])
def test_chains_compile(capability: int) -> None:
    norm = {"SIZE": 4096, "WIDTH": 4096, "OFFSET": 1.0, "ROUND_FIRST": True}
    compiled(fused_kernels.norm_kernel, norm, "*bf16", capability)
    rotation = {"HEADS": 32, "OTHER_HEADS": 8, "SIZE": 80, "WIDTH": 128, "ANGLES": 80, **PLAIN_HEADS}
    compiled(fused_kernels.rotate_kernel, rotation, "*bf16", capability)


@pytest.mark.parametrize(("capability", "fp8"), [(80, False), (89, True), (90, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_for_other_types(dtype: torch.dtype, capability: int, fp8: bool) -> None:
    heads, shape, options = LAYERS["llama-3.1-8b"]
    pointer = "*fp32" if dtype == torch.float32 else "*fp16"
    for kernel, constants in (
        (triton_write.write_kernel, write_options(shape, 16, fp8=fp8)),
        (triton_kernels.decode_kernel, decode_options(shape, heads, dtype, 16, options, fp8=fp8)),
        (triton_kernels.prefill_kernel, prefill_options(shape, heads, dtype, 16, options, fp8=fp8)),
    ):
        assert compiled(kernel, constants, pointer, capability).metadata.shared <= SHARED_MEMORY


LATENT = KVShape(1, 576, 512, values_in_keys=True)
WIDE_LOADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "write": (triton_write.write_kernel, write_options(KVShape(8, 128, 128), 16)),
    "decode": (triton_kernels.decode_kernel, decode_options(KVShape(8, 128, 128), 32, torch.bfloat16, 16, PLAIN)),
    "prefill": (triton_kernels.prefill_kernel, prefill_options(KVShape(8, 128, 128), 32, torch.bfloat16, 16, PLAIN)),
    "decode of latents": (triton_kernels.decode_kernel, decode_options(LATENT, 20, torch.bfloat16, 16, PLAIN)),
    "prefill of latents": (triton_kernels.prefill_kernel, prefill_options(LATENT, 20, torch.bfloat16, 16, PLAIN)),
    "norm": (
        fused_kernels.norm_kernel,
        {"SIZE": 4096, "WIDTH": 4096, "OFFSET": 1.0, "ROUND_FIRST": True, "num_warps": 8},
    ),
    "rotate": (
        fused_kernels.rotate_kernel,
        {"HEADS": 32, "OTHER_HEADS": 8, "SIZE": 128, "WIDTH": 128, "ANGLES": 128, **PLAIN_HEADS, "num_warps": 1},
    ),
}


@pytest.mark.parametrize("name", WIDE_LOADS)
def test_no_number_is_loaded_alone(name: str) -> None:
    kernel, constants = WIDE_LOADS[name]
    assert kernel.do_not_specialize is None or not {*STRIDES, *OTHER_STRIDES}.intersection(kernel.do_not_specialize)
    assert "ld.global.b16" not in compiled(kernel, constants, "*bf16", 90, wide=True).asm["ptx"]
    assert "ld.global.b16" in compiled(kernel, constants, "*bf16", 90).asm["ptx"]


def test_strides_are_multiples_or_the_same_in_every_step() -> None:
    def strides(heads: int, tokens: int, size: int) -> tuple[int, ...]:
        return _steadily_strided(torch.zeros(heads, tokens, size).transpose(0, 1)).stride()

    assert strides(8, 37, 64) == (64, 37 * 64, 1)  # as they are
    assert {strides(3, tokens, 20) for tokens in (2, 16, 37)} == {(60, 20, 1)}
    part = torch.zeros(5, 3 * 128)[:, 128:256].view(5, 2, 64)
    assert _steadily_strided(part) is part


def register_usage(made: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory that it takes because they are too few."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown
    return int(found[1]), int(found[2])


def compiled(kernel: Any, constants: dict[str, Any], pointer: str, capability: int, wide: bool = False) -> Any:
    """Compile to a binary for a device that is not here; ``wide`` promises strides that are multiples of 16."""
    settings = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    values = {name: value for name, value in constants.items() if name not in settings}
    tensors = {"out", "query", "keys", "values", "sinks", "new_keys", "new_values", "index", "partial", "stats"}
    tensors |= {"counters", "other_out", "source", "other", "weight", "other_weight", "cos", "sin"}
    stored = {"keys": "*fp8e4nv", "values": "*fp8e4nv"} if constants.get("FP8") else {}
    tensors |= {"key_scales", "value_scales"}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        plain = pointer if name in tensors else "i32"
        signature[name] = "constexpr" if name in values else {**TYPES, **stored}.get(name, plain)
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    multiples = tensors.union(STRIDES, OTHER_STRIDES) if wide else tensors
    aligned = {places[name]: [["tt.divisibility", 16]] for name in signature if name in multiples}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in values.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
