"""The command line of the harness: what it refuses before a server is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.cli import HarnessOptions, compare, scenario_of
from server.config.errors import ConfigError
from server.config.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scenario": "R8"}, "'R8' is unknown; there are throughput, R2"),
        ({"scenario": "frontend", "peers": ("llama.cpp",)}, "measures Castor alone: leave out --peer llama.cpp"),
        (
            {"scenario": "R5", "peers": ("transformers",)},
            "takes llama.cpp, llama.cpp-native as peers: leave out --peer transformers",
        ),
        ({"scenario": "R1", "rates": [1.0]}, "--rate has no effect on the scenario R1, which takes --tokens"),
        ({"model": "none-such"}, "no model is named 'none-such'; "),
        ({"peers": ("vllm",)}, "'vllm' is unknown; there are llama.cpp, llama.cpp-native, transformers"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, object], words: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "models.yaml").write_text(f"models:\n  m: {{source: {tmp_path}, device: cpu}}\n")
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path, models=tmp_path / "models.yaml")
    with pytest.raises(ConfigError) as raised:
        compare(HarnessOptions(**options, output=tmp_path), settings)  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_sizes_of_the_weights_are_for_the_scenario_that_reads_them() -> None:
    assert "weights_bytes" in scenario_of(HarnessOptions(scenario="R1")).scenario.sizes


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--help"], 0, "Start Castor and its peers in turn"),
        (["--scenario", "R8"], 1, "castor: the scenario 'R8' is unknown"),
        (["http://127.0.0.1:9"], 2, "unexpected extra argument"),
    ],
)
def test_the_program(args: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "benchmarks.harness", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
