"""Code that the wheel ships; else compiled once, for this processor, with a reason in words where it cannot be done."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

import pytest

from engine.native.compiled import compiler as the_compiler
from engine.native.compiled import machine_code, processor, shipped
from engine.native.compiled.shipped import INSTRUCTION_SETS
from engine.native.errors import NotNative


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code computes is the matter of other tests, which compile it as it is served."""
    flags = tuple(flag if flag != "-O3" else "-O0" for flag in the_compiler.FLAGS)
    monkeypatch.setattr(the_compiler, "FLAGS", flags)


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code.load_code(tmp_path)
    (made,) = tmp_path.iterdir()
    monkeypatch.setattr(machine_code, "compile_code", lambda *_: pytest.fail("it was compiled again"))
    machine_code.load_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_another_processor_gets_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code.load_code(tmp_path)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path.with_suffix(".none"))
    machine_code.load_code(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_engines_that_start_together_find_whole_code(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def load() -> None:
        try:
            machine_code.load_code(tmp_path)
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
        machine_code.load_code(tmp_path)


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "echo 'no such target' >&2; exit 1"))
    with pytest.raises(NotNative, match=r"cannot compile forward\.c: no such target"):
        machine_code.load_code(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_compiler, "COMPILE_SECONDS", 0.2)
    monkeypatch.setenv("CC", compiler(tmp_path, "exec sleep 5"))
    with pytest.raises(NotNative, match="did not end within"):
        machine_code.load_code(tmp_path / "cache")


def test_a_compiler_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(compiler(tmp_path, ""))
    path.write_bytes(b"no program at all")
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(NotNative, match="cannot be run"):
        machine_code.load_code(tmp_path / "cache")


def test_what_a_compiler_says_may_be_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, r"printf 'caf\351\n' >&2; exit 1"))
    with pytest.raises(NotNative, match=r"cannot compile forward\.c: caf"):
        machine_code.load_code(tmp_path / "cache")


def test_a_compiler_may_have_options_and_wrappers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = the_compiler.find_compiler()
    monkeypatch.setenv("CC", f"env 'NAME=two words' {own}")
    assert the_compiler.find_compiler()[1:] == ["NAME=two words", own]
    machine_code.load_code(tmp_path)


def test_another_compiler_makes_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = the_compiler.find_compiler()
    monkeypatch.setenv("CC", compiler(tmp_path, f'[ "$1" = --version ] && echo 1 || exec {own} "$@"'))
    machine_code.load_code(tmp_path / "cache")
    compiler(tmp_path, f'[ "$1" = --version ] && echo 2 || exec {own} "$@"')
    machine_code.load_code(tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_code_stays_when_its_compiler_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that is made with a compiler and run without."""
    machine_code.load_code(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine_code, "compile_code", lambda *_: pytest.fail("it was compiled again"))
    machine_code.load_code(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000])
def test_code_that_cannot_be_loaded_is_made_anew(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = prepared(tmp_path)
    made.write_bytes(content)
    assert machine_code.load_code(tmp_path).castor_open
    assert "is compiled again" in caplog.text
    assert made.stat().st_size > 5000


def test_code_that_never_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where both the cache and the folder of temporary files forbid programs."""
    monkeypatch.setattr(machine_code, "compile_code", lambda *given: given[-1].write_bytes(b""))
    with pytest.raises(NotNative, match="cannot be loaded: "):
        machine_code.load_code(tmp_path)


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = prepared(tmp_path)
    made.write_bytes(b"what somebody else wants to be run")
    tmp_path.chmod(0o777)
    assert machine_code.load_code(tmp_path).castor_open
    assert "others may write there" in caplog.text
    assert made.read_bytes() == b"what somebody else wants to be run"


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert machine_code.load_code(tmp_path).castor_open
    assert "others may write there" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_others_may_write_is_replaced(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    made.write_bytes(b"what somebody else wants to be run")
    made.chmod(0o777)
    assert machine_code.load_code(tmp_path).castor_open
    assert made.stat().st_mode & 0o777 == 0o700


def test_the_folder_is_made_for_nobody_else(tmp_path: Path) -> None:
    machine_code.load_code(tmp_path / "a" / "native")
    assert (tmp_path / "a" / "native").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("")
    assert machine_code.load_code(tmp_path / "cache").castor_open
    assert "compiled at each start" in caplog.text


def prepared(cache: Path) -> Path:
    """The file where the code of this machine is kept, with other code: what was loaded once stays in the process."""
    made = machine_code._target(cache)
    made.touch(0o700)
    return made


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a wheel has its code for this processor; nothing is there yet."""
    (tmp_path / "shipped").mkdir()
    instructions = INSTRUCTION_SETS[platform.machine()][0]
    (tmp_path / "cpuinfo").write_text(f"flags : {' '.join(instructions.features)}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    return tmp_path / "shipped" / instructions.file_name


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


def test_what_is_shipped_needs_no_compiler_and_no_cache(
    library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = INSTRUCTION_SETS[platform.machine()][0].options
    the_compiler.compile_code(the_compiler.find_compiler(), [options], library)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    caplog.set_level("INFO")
    cache = library.parents[1] / "cache"
    machine_code.require_code()
    assert machine_code.load_code(cache).castor_open
    assert not cache.exists()
    assert caplog.messages == [f"The native code is the wheel's, {library.name}"]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("content", [b"", b"\0" * 5000])
def test_what_is_shipped_and_cannot_be_loaded(content: bytes, library: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.write_bytes(content)
    with pytest.raises(NotNative, match="no C compiler; install gcc or clang"):
        machine_code.load_code(library.parents[1] / "cache")
    assert "of the wheel cannot be loaded" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_what_is_shipped_for_other_sources(library: Path) -> None:
    library.with_name("forward-0123456789abcdef-avx2.so").touch()
    with pytest.raises(NotNative, match="no C compiler; install gcc or clang"):
        machine_code.require_code()
    with pytest.raises(NotNative, match="no C compiler; install gcc or clang"):
        machine_code.load_code(library.parents[1] / "cache")
