"""What is built where no code can be compiled into the wheel, and which platform a wheel is for where it can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.native.errors import NotNative
from hatch_build import CompiledCode, compiled, manylinux

ROOT = Path(__file__).parents[2]


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_wheel_is_for_any_machine(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    outside = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": ""}
    done = subprocess.run(build, env=outside, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    assert "has no compiled code, and is for any machine: there is no C compiler" in done.stdout + done.stderr


def test_an_editable_wheel_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, f"touch {tmp_path}/called; exit 1"))
    data: dict[str, Any] = {}
    CompiledCode(str(ROOT), {}, None, None, str(tmp_path), "wheel").initialize("editable", data)
    assert data == {}
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        ("__x86_64__ __APPLE__", "makes no programs for Linux on x86_64 or aarch64"),
        ("__riscv __linux__", "makes no programs for Linux on x86_64 or aarch64"),
        ("__x86_64__ __linux__", r"cannot compile forward\.c: no such option"),
    ],
)
def test_a_compiler_that_is_of_no_use(
    macros: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"[ $1 = -dM ] && printf '#define %s 1\\n' {macros} || {{ echo 'no such option' >&2; exit 1; }}"
    monkeypatch.setenv("CC", compiler(tmp_path, told))
    with pytest.raises(NotNative, match=reason):
        compiled(tmp_path)


def library(folder: Path, *names: bytes) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.so"
    path.write_bytes(b"\x7fELF\0" + b"\0".join((b"expf", *names, b"")))
    return path


@pytest.mark.parametrize(
    ("names", "platform"),
    [
        ((b"GLIBC_2.2.5",), "manylinux_2_17_x86_64"),  # torch has nothing for older ones
        ((b"GLIBC_2.34", b"GLIBC_2.4"), "manylinux_2_34_x86_64"),
        ((b"GLIBC_2.28", b"GLIBC_ABI_DT_RELR"), "manylinux_2_36_x86_64"),
    ],
)
def test_a_wheel_is_for_the_newest_version_of_the_c_library_that_it_asks_for(
    names: tuple[bytes, ...], platform: str, tmp_path: Path
) -> None:
    libraries = [library(tmp_path, b"GLIBC_2.14"), library(tmp_path, *names)]
    assert manylinux("x86_64", libraries) == platform


def test_another_c_library(tmp_path: Path) -> None:
    with pytest.raises(NotNative, match="its C library is not glibc"):
        manylinux("x86_64", [library(tmp_path, b"libc.musl-x86_64.so.1")])
