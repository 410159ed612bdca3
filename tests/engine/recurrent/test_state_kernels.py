"""The kernels of recurrent layers compiled for devices that are not here, in the sizes of models that makers published.

Their numbers are compared by ``tests/interpreted/test_recurrent_kernels.py``.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engine.recurrent import state_kernels as kernels  # noqa: E402
from engine.recurrent.triton_states import (  # noqa: E402
    chunk_options,
    convolution_options,
    delta_options,
    mamba2_options,
)

QWEN = {"CHANNELS": 8192, "TAPS": 4, "BIASED": False, "SILU": True, **convolution_options(8192)}
DELTA = {"NORMED": True, "BY_CHANNEL": False, "PICKED": False, **delta_options(32, 16, 128, 128)}
MAMBA = {"SKIPS": True, "BIASED": True, "SOFTPLUS": True, "PICKED": True, **mamba2_options(48, 1, 64, 128)}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "decodes of a convolution": (kernels.convolve_decodes_kernel, QWEN),
    "chunks of a convolution": (kernels.convolve_kernel, {**QWEN, **chunk_options()}),
    "state of a convolution": (kernels.keep_convolved_kernel, QWEN),
    "gated delta net of Qwen3.5 4B": (kernels.delta_kernel, DELTA),
    "mamba 2 of Granite 4.0 H Tiny": (kernels.mamba2_kernel, MAMBA),
}
FLOATS = {"scaling", "lowest", "highest"}
# Of the type of the model; states of a recurrence are float32, as are the output of Mamba-2 and its decay.
MODELS = {"out", "x", "weight", "bias", "query", "key", "value", "beta", "dt", "writing", "reading", "skip", "dt_bias"}
INTEGERS = {"slots", "rows", "firsts", "starts", "lengths"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_states_stay_in_registers_and_are_read_in_wide_pieces(name: str, capability: int) -> None:
    made = compiled(*KERNELS[name], capability)
    assert spilled(made) == 0
    # Four numbers of a state at once, or eight of a convolution in bfloat16.
    assert re.search(r"ld\.global\S*\.v[48]\.b32", made.asm["ptx"])


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    """With strides that are multiples of 16, as those of models are."""
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        convolved = "CHANNELS" in values and name == "states"
        if name in values:
            signature[name] = "constexpr"
        elif name in MODELS or convolved:
            signature[name] = "*fp32" if name == "out" and kernel is kernels.mamba2_kernel else "*bf16"
        elif name in INTEGERS:
            signature[name] = "*i64"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name.endswith("_stride") or name == "num_tokens" else "*fp32"
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, {places[name]: value for name, value in values.items()}, aligned)
    settings = {"num_warps": constants["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


def spilled(made: Any) -> int:
    """Bytes of local memory that a thread takes because its registers are too few."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = Path(made.metadata_group[next(name for name in made.metadata_group if name.endswith(".cubin"))])
    shown = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+)", shown)
    assert found is not None, shown
    return int(found[1])
