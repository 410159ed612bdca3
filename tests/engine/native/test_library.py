"""Compiling: once, for this processor, with a reason in words where it cannot be done."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.native import library
from engine.native.errors import NotNative


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load_library(tmp_path)
    (made,) = tmp_path.iterdir()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("it was compiled again"))
    library.load_library(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_another_processor_gets_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load_library(tmp_path)
    monkeypatch.setattr(library, "_processor", lambda: b"another one")
    library.load_library(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_engines_that_start_together_find_whole_code(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def load() -> None:
        try:
            library.load_library(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NotNative, match="no C compiler; install gcc or clang"):
        library.load_library(tmp_path)


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "echo 'no such target' >&2; exit 1"))
    with pytest.raises(NotNative, match=r"cannot compile forward\.c: no such target"):
        library.load_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "COMPILE_SECONDS", 0.2)
    monkeypatch.setenv("CC", compiler(tmp_path, "exec sleep 5"))
    with pytest.raises(NotNative, match="did not end within"):
        library.load_library(tmp_path / "cache")


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(NotNative, match="cannot be kept in"):
        library.load_library(tmp_path / "cache")
