"""Which of the libraries of a wheel is loaded. Here they are empty files: what is in them is read by none of this."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from engine.native.compiled import compiler, processor, shipped
from engine.native.compiled.shipped import INSTRUCTION_SETS, shipped_library

AVX2 = "sse4_2 avx avx2 f16c fma bmi2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With all libraries of all machines."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    for instructions in sum(INSTRUCTION_SETS.values(), ()):
        (tmp_path / instructions.file_name).touch(0o644)
    return tmp_path


def chosen(machine: str, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The name of the instructions."""
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {features}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    path = shipped_library()
    return path and path.stem.rpartition("-")[2]


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (AVX512, "avx512"),
        (AVX2, "avx2"),
        ("sse4_2 avx avx2 f16c", None),  # every one is needed
        (f"{AVX2} avx512f avx512cd", "avx2"),  # Knights Landing has but these
        (AVX512.replace("f16c", ""), None),
        ("sse4_2 avx", None),
        ("", None),
    ],
)
def test_the_best_that_the_processor_can_run(
    features: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("x86_64", features, tmp_path, monkeypatch) == name


def test_every_processor_by_arm_has_neon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("aarch64", "", tmp_path, monkeypatch) == "neon"


def test_nothing_is_shipped_for_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("riscv64", AVX512, tmp_path, monkeypatch) is None


def test_the_next_best_where_one_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / INSTRUCTION_SETS["x86_64"][0].file_name).unlink()
    assert chosen("x86_64", AVX512, folder, monkeypatch) == "avx2"


@pytest.mark.parametrize("name", ["forward.c", "kernels.h"])
def test_code_of_other_sources_is_not_used(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = shutil.copytree(compiler.SOURCE.parent, folder / "native", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.setattr(compiler, "SOURCE", sources / "forward.c")
    assert chosen("x86_64", AVX2, folder, monkeypatch) == "avx2"
    (sources / name).write_text((sources / name).read_text() + "/* changed */\n")
    assert chosen("x86_64", AVX2, folder, monkeypatch) is None


def test_code_that_others_may_write_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / INSTRUCTION_SETS["x86_64"][0].file_name).chmod(0o666)
    assert chosen("x86_64", AVX512, folder, monkeypatch) == "avx2"
    assert "others may write it than the modules beside it" in caplog.text
