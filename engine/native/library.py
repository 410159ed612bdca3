"""The C code as a library: compiled for this very processor at its first use, kept in the cache, called through ctypes.

The structures mirror those of ``forward.c`` and ``matmul.h``, field by field.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int32, c_uint8, c_void_p
from pathlib import Path
from typing import Any

from engine.native.errors import NotNative

SOURCE = Path(__file__).with_name("forward.c")
HEADERS = ("attention.h", "matmul.h", "pool.h", "vectors.h")
# The first that the compiler takes: x86 knows -march=native, some compilers for ARM only the other.
TARGETS: tuple[str, ...] = ("-march=native", "-mcpu=native")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
LIBRARIES = ("-lm", "-lpthread")
COMPILE_SECONDS = 300


class Matrix(Structure):
    _fields_ = (
        ("panels", POINTER(c_void_p)),
        ("formats", POINTER(c_uint8)),
        ("bias", c_void_p),
        ("num_panels", c_int32),
        ("columns", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm", "keys", "values")),
        ("window", c_int32),
    )


_SIZES = ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "size", "rotary", "block_size", "max_context")


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("head", Matrix),
        *((name, c_void_p) for name in ("norm", "cosines", "sines")),
        *((name, c_int32) for name in _SIZES),
        ("eps", c_float),
        ("scaling", c_float),
    )


class Batch(Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("wanted", c_int32),
        *((name, c_void_p) for name in ("positions", "tables", "table_starts", "rows", "states", "logits")),
    )


def load_library(cache: Path) -> Any:
    """The compiled code. Raises ``NotNative`` where there is no compiler, or none that makes something usable."""
    library = ctypes.CDLL(str(_compiled(cache)))
    library.castor_open.argtypes = [POINTER(Model), ctypes.c_int]
    library.castor_open.restype = c_void_p
    library.castor_close.argtypes = [c_void_p]
    library.castor_close.restype = None
    library.castor_forward.argtypes = [c_void_p, POINTER(Batch)]
    library.castor_forward.restype = ctypes.c_int
    return library


def _compiled(cache: Path) -> Path:
    compiler = find_compiler()
    target = cache / f"forward-{_fingerprint(compiler)}.so"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / target.name
            _compile(compiler, made)
            os.replace(made, target)  # whole or not there: several engines may start at once
    except OSError as error:
        raise NotNative(f"the compiled code cannot be kept in {cache}: {error}") from error
    return target


def find_compiler() -> str:
    candidates = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        raise NotNative("there is no C compiler; install gcc or clang")
    return found


def _compile(compiler: str, target: Path) -> None:
    output = ""
    for option in (*TARGETS, None):
        command = [compiler, *FLAGS, *([option] if option else []), "-o", str(target), str(SOURCE), *LIBRARIES]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise NotNative(f"{compiler} did not end within {COMPILE_SECONDS} s") from None
        if result.returncode == 0:
            return
        output = result.stderr
    raise NotNative(
        f"{compiler} cannot compile {SOURCE.name}: {(output.strip().splitlines() or ['no reason given'])[0]}"
    )


def _fingerprint(compiler: str) -> str:
    """Everything that the code depends on, the processor's own instructions among it."""
    content = hashlib.sha256("\n".join((compiler, platform.machine(), *FLAGS, *TARGETS)).encode())
    content.update(_processor())
    for name in (SOURCE.name, *HEADERS):
        content.update(SOURCE.with_name(name).read_bytes())
    return content.hexdigest()[:16]


def _processor() -> bytes:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor().encode()
    kept = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(kept)})).encode()
