"""What /proc/cpuinfo says."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.native.compiled import processor

X86 = """processor\t: {number}
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: {speed}
flags\t\t: fpu sse2 fma f16c {more}
bugs\t\t: spectre_v1 spectre_v2

"""
ARM = """processor\t: {number}
Features\t: fp asimd evtstrm aes {more}
CPU implementer\t: 0x41
CPU part\t: {part}

"""


def given(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")


def test_features_of_x86(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = [X86.format(number=number, speed=2445, more="avx avx2") for number in range(2)]
    given("".join(cores), tmp_path, monkeypatch)
    assert processor.features() == {"fpu", "sse2", "fma", "f16c", "avx", "avx2"}


def test_only_what_every_core_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(
        ARM.format(number=0, more="sve", part="0xd44") + ARM.format(number=1, more="", part="0xd46"),
        tmp_path,
        monkeypatch,
    )
    assert processor.features() == {"fp", "asimd", "evtstrm", "aes"}


@pytest.mark.parametrize("text", ["", "processor : 0\n", "no colon\n\n"])
def test_nothing_is_known(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(text, tmp_path, monkeypatch)
    assert processor.features() == frozenset()


def test_a_system_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert processor.features() == frozenset()
    assert isinstance(processor.description(), str)


def test_the_description_does_not_change_with_speed_or_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(X86.format(number=0, speed=2445, more="avx2"), tmp_path, monkeypatch)
    one = processor.description()
    given(X86.format(number=1, speed=1500, more="avx2"), tmp_path, monkeypatch)
    assert processor.description() == one
    given(X86.format(number=0, speed=2445, more="avx2 avx512f"), tmp_path, monkeypatch)
    assert processor.description() != one
