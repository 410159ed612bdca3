"""Finds machine code for this processor: shipped, else kept in the cache, else compiled."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

from engine.native.compiled import processor
from engine.native.compiled.compiler import compile_code, find_compiler, fingerprint, run
from engine.native.compiled.shipped import shipped_library
from engine.native.compiled.trust import is_ours
from engine.native.errors import NotNative

_log = logging.getLogger(__name__)

# x86 knows -march=native, some compilers for ARM only the other, and some neither.
TARGETS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())


def load_code(cache: Path | None) -> ctypes.CDLL:
    """The code that the wheel has for this processor; where it has none, what is compiled for it.

    That is kept in ``cache`` for the next start if no other user can write there. Raises ``NotNative`` if there is no
    compiler either, or if what it makes cannot be used.
    """
    shipped = shipped_library()
    if shipped is not None:
        try:
            code = ctypes.CDLL(str(shipped))
            _log.info("The native code is the wheel's, %s", shipped.name)
            return code
        except OSError as error:
            _log.warning("The native code of the wheel cannot be loaded: %s", error)
    if cache is not None:
        try:
            return _kept(cache)
        except OSError as error:
            _log.warning("The native code is compiled at each start, because it cannot be kept in %s: %s", cache, error)
    with tempfile.TemporaryDirectory(prefix="castor-") as folder:
        made = Path(folder) / "forward.so"
        compile_code(find_compiler(), TARGETS, made)
        try:
            return _loaded(made)
        except OSError as error:
            raise NotNative(f"the compiled code in {made} cannot be loaded: {error}") from error


def require_code() -> None:
    """Raises ``NotNative`` where nothing shipped fits this processor, and nothing can be compiled for it."""
    if shipped_library() is None:
        find_compiler()


def _kept(cache: Path) -> ctypes.CDLL:
    """The code in the cache, compiled if it is absent or broken. Raises ``OSError`` if it cannot be kept there."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(cache):
        raise PermissionError("others may write there")
    target = _target(cache)
    if target.is_file() and is_ours(target):
        try:
            return _loaded(target)
        except OSError as error:
            _log.warning("%s is compiled again: %s", target, error)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        compile_code(find_compiler(), TARGETS, made)
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # bytes before the name, or a power loss could leave an empty file
        os.replace(made, target)  # whole or not there: several engines may start at once
    return _loaded(target)


def _loaded(path: Path) -> ctypes.CDLL:
    code = ctypes.CDLL(str(path))
    _log.info("The native code was compiled for this processor, %s", path.name)
    return code


def _target(cache: Path) -> Path:
    """The path of the code that this compiler makes. Without a compiler, the newest code that any of them made."""
    here = (platform.machine(), *platform.libc_ver(), repr(TARGETS), processor.description())
    prefix = f"forward-{fingerprint(*here)}"
    try:
        compiler = find_compiler()
    except NotNative:
        made = sorted(cache.glob(f"{prefix}-*.so"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise
        return made[-1]
    version = run([*compiler, "--version"]).stdout
    return cache / f"{prefix}-{hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]}.so"
