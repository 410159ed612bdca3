"""``scripts/gpu_check`` without a GPU: every line of it with tiny shapes, and what it says where it cannot run."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import lively_model_folder, plain_model
from support.paged import plain_logits as plain_logits_of_tests

from engine.attention.reference import ReferenceAttention
from engine.model import LoadedModel, load_model
from engine.types import EngineConfig

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


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def machine() -> Any:
    from gpu_checks.setup import Machine

    return Machine(torch.device("cpu"), True, ReferenceAttention, None)


@pytest.mark.usefixtures("scripts")
def test_a_model_that_cannot_be_checked_is_a_finding() -> None:
    from gpu_checks.correctness import _model

    def fail() -> LoadedModel:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    (found,) = _model(machine(), "odd", fail, 1e-3)
    assert not found.holds
    assert found.note == "RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.usefixtures("scripts")
def test_plain_logits_are_by_the_models_own_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks.setup import plain_logits
    from transformers.models.llama import modeling_llama

    folder = lively_model_folder(tmp_path, "llama", num_hidden_layers=2)
    model = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)

    def ours(*_: Any, **__: Any) -> Any:
        pytest.fail("not transformers' own")

    ours.castor_original = modeling_llama.apply_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ours)
    text = [5 + (i * i) % 200 for i in range(20)]
    torch.testing.assert_close(plain_logits(model, text), plain_logits_of_tests(plain_model(folder), text))


@pytest.mark.usefixtures("scripts")
def test_what_was_found_before_a_crash_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks import correctness

    def findings(_machine: object) -> Iterator[correctness.Finding]:
        yield correctness.Finding("first", 0.0, 1.0)
        yield correctness.Finding("second", math.inf, 1.0, "broken")
        raise KeyboardInterrupt

    monkeypatch.setattr(correctness, "findings", findings)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(tmp_path / "out.json")])
    main = runpy.run_path(str(ROOT / "scripts" / "gpu_check"))["main"]
    main.__globals__["find_machine"] = lambda smoke: machine()
    with pytest.raises(KeyboardInterrupt):
        main()
    found = json.loads((tmp_path / "out.json").read_text())["correctness"]
    assert [(finding["name"], finding["holds"]) for finding in found] == [("first", True), ("second", False)]


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
@pytest.mark.usefixtures("scripts")
def test_devices_are_known_by_their_names(name: str, bandwidth: float | None) -> None:
    from gpu_checks.speed import datasheet

    assert datasheet(name) == bandwidth
