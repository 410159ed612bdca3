"""``scripts/gpu_check`` without a GPU: every line of it with tiny shapes, and what it says where it cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What Castor needs and a plain image for CUDA lacks.
ABSENT = ("accelerate", "llguidance", "msgspec", "zmq", "pydantic", "starlette", "gguf", "typer", "rich", "structlog")
PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "scripts" / "gpu_check"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=850, cwd="/")


@pytest.mark.timeout(900)
def test_a_smoke_run_goes_through_everything(tmp_path: Path) -> None:
    run = gpu_check("--cpu-smoke", "--minutes", "60", "--json", str(tmp_path / "made" / "out.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "made" / "out.json").read_text())
    assert found["environment"]["device"] == "CPU, smoke run"
    assert all(finding["holds"] for finding in found["correctness"])
    (speed,) = found["speed"]
    assert set(speed["throughput"]) == set(speed["decode"]) == {"1", "3"}
    assert set(speed["decode_eager"]) == {"1"}
    assert speed["skipped"] == []
    assert speed["recorded"]
    assert "of the copy bandwidth" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    run = gpu_check()
    assert run.returncode == 2
    assert run.stderr == (
        "gpu_check: torch sees no CUDA GPU here; run this where nvidia-smi lists one, or with --cpu-smoke.\n"
    )


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA L4", 300),
        ("NVIDIA L40S", 864),
        ("NVIDIA Unheard Of", None),
    ],
)
def test_devices_are_known_by_their_names(name: str, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_checks.speed import datasheet

    assert datasheet(name) == bandwidth
