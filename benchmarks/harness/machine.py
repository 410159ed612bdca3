"""The device and threads of all servers on this machine, as the engine chooses them, and the build of llama.cpp."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.programs import output_of
from server.config.errors import ConfigError
from server.config.models_file import ModelSpec

CPU_INFO = Path("/proc/cpuinfo")
ASK_SECONDS = 120
_ASK_ENGINE = """
import json, sys
from engine.device.cpu_count import default_threads
from engine.model.loader import resolve_device
print(json.dumps({"device": str(resolve_device(sys.argv[1])), "threads": default_threads()}))
"""
_ASK_LLAMA_CPP = "import xllamacpp; print(xllamacpp.get_system_info())"


@dataclass(frozen=True, slots=True)
class Choice:
    """What Castor's engine computes with. The peers get the same, so that the comparison is of servers, not devices."""

    device: str
    threads: int

    def dtype(self, spec: ModelSpec) -> str:
        """The type of weights as the engine resolves it; "auto" is the checkpoint's own, for the engine and for
        peers."""
        return "float32" if spec.dtype == "auto" and self.device == "cpu" else spec.dtype


def choice_of(spec: ModelSpec) -> Choice:
    """The engine's choice, from a separate process because only torch knows it. Raises ``ConfigError``."""
    said = output_of("castor's engine", [sys.executable, "-c", _ASK_ENGINE, spec.device], "", ASK_SECONDS)
    try:
        return Choice(**json.loads(said))
    except (ValueError, TypeError):
        raise ConfigError(f"castor's engine did not print its device and threads, but {said[-200:]!r}") from None


def llama_cpp_build(name: str, python: Path) -> str:
    """The processor features that the llama.cpp of an environment reports to be compiled for. Raises
    ``ConfigError``."""
    return output_of(name, [str(python), "-c", _ASK_LLAMA_CPP], "", ASK_SECONDS).strip()


def computes_on_gpu(build: str) -> bool:
    """Whether a build has a backend beside that of the CPU: it lists each by name, as in ``CUDA : … | CPU : …``."""
    return bool(set(re.findall(r"(\w+) :", build)) - {"CPU"})


def build_in_words(name: str, build: str) -> str:
    """The build as text, with a warning where it leaves out what this processor could do."""
    features = re.findall(r"(\w+) = 1", build)
    words = f"{name} is compiled for {', '.join(features) or 'no extension of this kind of processor'}"
    if "AVX512" in features or not has_avx512():
        return words
    return f"! {words}: not for AVX-512, which Castor's code uses here; compare with --peer llama.cpp-native as well"


def has_avx512() -> bool:
    """Whether this processor has the extension; False where the system does not report it."""
    try:
        return re.search(r"^flags\s*:.*\bavx512f\b", CPU_INFO.read_text(), re.MULTILINE) is not None
    except OSError:
        return False
