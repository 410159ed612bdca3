"""The C code as a library: compiled for this processor at its first use, kept in the cache, called through ctypes.

The structures mirror those of ``model.h``, ``matmul.h`` and ``states.h``, field by field.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

from engine.native.errors import NotNative

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("forward.c")
HEADERS = tuple(sorted(path.name for path in SOURCE.parent.glob("*.h")))
# The first that the compiler takes: x86 knows -march=native, some compilers for ARM only the other.
TARGETS: tuple[str, ...] = ("-march=native", "-mcpu=native")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
LIBRARIES = ("-lm", "-lpthread")
COMPILE_SECONDS = 300


def _tensors(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_void_p) for name in names)


def _numbers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_int32) for name in names)


class Matrix(Structure):
    _fields_ = (
        ("panels", POINTER(c_void_p)),
        ("formats", POINTER(c_uint8)),
        ("bias", c_void_p),
        ("num_panels", c_int32),
        ("columns", c_int32),
    )


class Gate(Structure):
    _fields_ = (*_numbers("activation", "alternating"), ("steepness", c_float), ("limit", c_float))


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        ("gate", Gate),
        ("router", Matrix),
        *((name, POINTER(Matrix)) for name in ("experts_gate_up", "experts_down")),
        ("experts_gate", Gate),
        ("correction", c_void_p),
        *_numbers("num_experts", "num_chosen", "num_groups", "groups_chosen"),
        *_numbers("sigmoid", "shares_of_chosen", "gates_shared"),
        ("routed_scale", c_float),
        *_tensors("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm"),
        *_tensors("cosines", "sines", "sinks", "keys", "values"),
        *_numbers("pairs", "alternating", "whole_norms", "window", "group"),
        ("scaling", c_float),
        ("softcap", c_float),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        *_numbers("num_layers", "hidden", "intermediate", "heads", "kv_heads", "size", "block_size", "max_context"),
        *_numbers("num_experts", "num_chosen"),
        *((name, c_float) for name in ("eps", "embedding_scale", "branch_scale", "logit_scale", "logit_softcap")),
    )


class Batch(Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("wanted", c_int32),
        ("table_size", c_int32),
        *((name, c_void_p) for name in ("ids", "vectors", "positions", "tables", "table_starts", "rows", "logits")),
    )


class Delta(Structure):
    _fields_ = (
        *_tensors("query", "key", "value", "beta", "decay", "out", "states", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "heads", "key_heads", "key_size", "value_size", "by_channel"),
    )


class Mamba2(Structure):
    _fields_ = (
        *_tensors("x", "dt", "decay", "writing", "reading", "skip", "out", "states", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "heads", "groups", "size", "width"),
    )


class Convolution(Structure):
    _fields_ = (
        *_tensors("x", "weights", "bias", "out", "states", "starts", "lengths", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "channels", "taps"),
    )


def load_library(cache: Path | None) -> Any:
    """The compiled code, kept in ``cache`` for the next start if no other user can write there.

    Raises ``NotNative`` if there is no compiler, or if what it makes cannot be used.
    """
    if cache is not None:
        try:
            return _declared(_kept(cache))
        except OSError as error:
            _log.warning("The native code is compiled at each start, because it cannot be kept in %s: %s", cache, error)
    with tempfile.TemporaryDirectory(prefix="castor-") as folder:
        made = Path(folder) / "forward.so"
        _compile(find_compiler(), made)
        try:
            return _declared(ctypes.CDLL(str(made)))
        except OSError as error:
            raise NotNative(f"the compiled code in {made} cannot be loaded: {error}") from error


def _declared(library: Any) -> Any:
    library.castor_open.argtypes = [POINTER(Model), ctypes.c_int]
    library.castor_open.restype = c_void_p
    library.castor_close.argtypes = [c_void_p]
    library.castor_close.restype = None
    library.castor_forward.argtypes = [c_void_p, POINTER(Batch)]
    library.castor_forward.restype = ctypes.c_int
    library.castor_products_open.argtypes = [ctypes.c_int]
    library.castor_products_open.restype = c_void_p
    library.castor_products_close.argtypes = [c_void_p]
    library.castor_products_close.restype = None
    library.castor_product.argtypes = [c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_int32]
    library.castor_product.restype = ctypes.c_int
    library.castor_states_open.argtypes = [ctypes.c_int]
    library.castor_states_open.restype = c_void_p
    library.castor_states_close.argtypes = [c_void_p]
    library.castor_states_close.restype = None
    for name, step in (("delta", Delta), ("mamba2", Mamba2), ("convolution", Convolution)):
        function = getattr(library, f"castor_{name}")
        function.argtypes = [c_void_p, POINTER(step)]
        function.restype = None
    return library


def _kept(cache: Path) -> ctypes.CDLL:
    """The code in the cache, compiled if it is absent or broken. Raises ``OSError`` if it cannot be kept there."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(cache):
        raise PermissionError("others may write there")
    target = _target(cache)
    if target.is_file() and _is_ours(target):
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:
            _log.warning("%s is compiled again: %s", target, error)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        _compile(find_compiler(), made)
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # bytes before the name, or a power loss could leave an empty file
        os.replace(made, target)  # whole or not there: several engines may start at once
    return ctypes.CDLL(str(target))


def _is_ours(path: Path) -> bool:
    """Whether only this user, or root, can have written it: what is loaded runs with all rights of this process."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _target(cache: Path) -> Path:
    """The path of the code that this compiler makes. Without a compiler, the newest code that any of them made."""
    prefix = f"forward-{_fingerprint()}"
    try:
        compiler = find_compiler()
    except NotNative:
        made = sorted(cache.glob(f"{prefix}-*.so"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise
        return made[-1]
    version = _run([*compiler, "--version"]).stdout
    return cache / f"{prefix}-{hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]}.so"


def find_compiler() -> list[str]:
    """The command that compiles C: ``CC``, which may contain options and wrappers, or one of the usual names."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    raise NotNative("there is no C compiler; install gcc or clang")


def _compile(compiler: list[str], target: Path) -> None:
    output = ""
    for option in (*TARGETS, None):
        result = _run([*compiler, *FLAGS, *([option] if option else []), "-o", str(target), str(SOURCE), *LIBRARIES])
        if result.returncode == 0:
            return
        output = result.stderr
    reason = (output.strip().splitlines() or ["no reason given"])[0]
    raise NotNative(f"{shlex.join(compiler)} cannot compile {SOURCE.name}: {reason}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotNative(f"{command[0]} did not end within {COMPILE_SECONDS} s") from None
    except OSError as error:
        raise NotNative(f"{command[0]} cannot be run: {error}") from error


def _fingerprint() -> str:
    """A hash of all that the code depends on except the compiler, with the processor's features and the C library."""
    content = hashlib.sha256("\n".join((platform.machine(), *platform.libc_ver(), *FLAGS, *TARGETS)).encode())
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
