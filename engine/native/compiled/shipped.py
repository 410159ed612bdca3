"""The code that a wheel brings: compiled for sets of instructions when the wheel was built, chosen at the start."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.native.compiled import processor
from engine.native.compiled.compiler import fingerprint
from engine.native.compiled.trust import as_safe_as, is_ours

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """``features`` are what a processor must have, by the names that Linux and, after ``-m``, compilers give them."""

    name: str
    features: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Of the compiler. Nothing more is allowed to it than ``features``; symbols would only take room."""
        return ("-s", *(f"-m{feature}" for feature in self.features))

    @property
    def file_name(self) -> str:
        """Of the library that belongs to these sources."""
        return f"forward-{fingerprint(*self.options)}-{self.name}.so"


_AVX2 = ("avx2", "fma", "f16c")
INSTRUCTION_SETS: Mapping[str, tuple[InstructionSet, ...]] = {
    "x86_64": (
        InstructionSet("avx512", (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")),
        InstructionSet("avx2", _AVX2),
    ),
    "aarch64": (InstructionSet("neon", ()),),
}
"""For each machine, the best first. Every processor of 64 bits by ARM has NEON."""


def shipped_library() -> Path | None:
    """The best library here that this processor can run, and that was made of these very sources; None without one."""
    has = processor.features()
    for instructions in INSTRUCTION_SETS.get(platform.machine(), ()):
        path = FOLDER / instructions.file_name
        if has.issuperset(instructions.features) and path.is_file():
            if is_ours(path) or as_safe_as(Path(__file__), path):
                return path
            _log.warning("%s is not used: others may write it than the modules beside it", path)
    return None
