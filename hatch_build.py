"""Compiles the C code of the engine into a wheel, for the machine that the C compiler makes programs for.

That is this one, or that of a cross compiler in ``CC``. The wheel is for Linux with the C library that its code needs.
Without a compiler, and for other systems, it has no compiled code and is for any machine: its users compile.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))

from engine.native.compiled.compiler import compile_code, find_compiler, run
from engine.native.compiled.shipped import FOLDER, INSTRUCTION_SETS
from engine.native.errors import NotNative

# Of the first manylinux that both machines have.
OLDEST_GLIBC = (2, 17)
# Some compilers make programs for better processors if they are not told. One of other names (zig) does not.
EVERY_PROCESSOR = {"x86_64": "-march=x86-64", "aarch64": "-march=armv8-a"}


class CompiledCode(BuildHookInterface[Any]):
    """Of a wheel; an editable one compiles at its first start what its sources are by then."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say which platform the wheel is for."""
        if version == "editable":
            return
        self._made = tempfile.TemporaryDirectory()  # until this process ends: the wheel is written later
        try:
            machine, libraries = compiled(Path(self._made.name))
            build_data["tag"] = f"py3-none-{manylinux(machine, libraries)}"
        except NotNative as reason:
            self.app.display_warning(f"This wheel has no compiled code, and is for any machine: {reason}")
            return
        folder = FOLDER.relative_to(Path(self.root).resolve())
        build_data["force_include"] |= {str(path): str(folder / path.name) for path in libraries}
        build_data["pure_python"] = False


def compiled(folder: Path) -> tuple[str, list[Path]]:
    """The machine, and a library for each of its sets of instructions. Raises ``NotNative``."""
    compiler = find_compiler()
    defined = set(run([*compiler, "-dM", "-E", "-x", "c", "/dev/null"]).stdout.split())
    machine = next((machine for machine in INSTRUCTION_SETS if f"__{machine}__" in defined), None)
    if machine is None or "__linux__" not in defined:
        raise NotNative(f"{shlex.join(compiler)} makes no programs for Linux on {' or '.join(INSTRUCTION_SETS)}")
    made = {folder / one.file_name: one.options for one in INSTRUCTION_SETS[machine]}
    with ThreadPoolExecutor() as threads:
        done = [
            threads.submit(compile_code, compiler, [(EVERY_PROCESSOR[machine], *options), options], path)
            for path, options in made.items()
        ]
        for each in done:
            each.result()
    return machine, list(made)


def manylinux(machine: str, libraries: list[Path]) -> str:
    """The platform that has the C library of the highest version that these ask for. Raises ``NotNative``."""
    versions = {OLDEST_GLIBC}
    for path in libraries:
        # The second is for relocations of a new kind.
        names = path.read_bytes().replace(b"GLIBC_ABI_DT_RELR", b"GLIBC_2.36")
        found = re.findall(rb"GLIBC_(\d+)\.(\d+)", names)
        if not found:
            raise NotNative("its C library is not glibc, for which alone torch has packages")
        versions |= {(int(major), int(minor)) for major, minor in found}
    major, minor = max(versions)
    return f"manylinux_{major}_{minor}_{machine}"
