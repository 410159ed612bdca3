"""What this machine computes with, in the engine's words and in llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import machine
from benchmarks.harness.machine import Choice
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec


@pytest.mark.parametrize(
    ("build", "flags", "words"),
    [
        ("CPU : AVX2 = 1 | FMA = 0 |", "avx2 avx512f", "! llama.cpp is compiled for AVX2: not for AVX-512, which"),
        ("CPU : AVX2 = 1 | FMA = 1 |", "avx2", "llama.cpp is compiled for AVX2, FMA"),
        ("CPU : AVX512 = 1 |", "avx512f", "llama.cpp is compiled for AVX512"),
    ],
)
def test_a_build_in_words(build: str, flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.build_in_words("llama.cpp", "CPU : REPACK = 1").endswith("compiled for REPACK")
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} sse\n")
    assert machine.build_in_words("llama.cpp", build).startswith(words)


def test_the_choice_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.choice_of(ModelSpec("m", "/m", device="cpu")) == Choice("cpu", 1)
    with pytest.raises(ConfigError, match=r"castor's engine failed with status 1: .*device 'warp' is not known"):
        machine.choice_of(ModelSpec("m", "/m", device="warp"))
