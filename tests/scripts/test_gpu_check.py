"""``scripts/gpu_check`` without a GPU: every part of it with tiny shapes, and what it says where it cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# What Castor needs and a plain image for CUDA lacks.
ABSENT = ("accelerate", "llguidance", "msgspec", "zmq", "pydantic", "starlette", "gguf", "typer", "rich", "structlog")
PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The parts and the watchdog are others: ``hang`` finds something, starts a child, and hangs until the watchdog bites.
BEFORE = f"""
import subprocess, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import gpu_checks.budget, gpu_checks.parts
from gpu_checks.goals import COPY

class Watchdog:
    def __init__(self, seconds, last_words):
        Watchdog.last_words = last_words

    def stop(self):
        pass

RealWatchdog, gpu_checks.budget.Watchdog = gpu_checks.budget.Watchdog, Watchdog

def hang(check):
    check.report.share(COPY, 0.5)
    check.children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
    print("child", check.children[0].pid, flush=True)
    check.report.doing("kernels: what hangs")
    RealWatchdog(0.2, Watchdog.last_words)
    time.sleep(600)
"""
HANGING = f"{BEFORE}\ngpu_checks.parts.run_of = lambda name: hang\n{PROGRAM}"


def gpu_check(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(ROOT / "scripts" / "gpu_check"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=850, cwd="/")


def found_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.timeout(900)
def test_a_smoke_run_goes_through_every_part_without_what_an_image_lacks(tmp_path: Path) -> None:
    path = tmp_path / "made" / "out.json"
    parts = "correctness,kernels,packed,decode,core,peers,server"
    run = gpu_check("--cpu-smoke", "--minutes", "60", "--only", parts, "--json", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    found = found_in(path)
    assert found["environment"]["device"] == "CPU, smoke run"
    assert list(found["seconds"])[1:] == parts.split(",")
    assert (found["doing"], found["end"]) == ("", "")
    states = {(finding["part"], finding["state"]) for finding in found["findings"]}
    assert not {state for _, state in states} & {"WRONG", "FAILED"}
    assert {
        ("correctness", "ok"),
        *((part, "measured") for part in ("kernels", "packed", "decode", "core", "peers")),
    } <= states
    (server,) = [finding for finding in found["findings"] if finding["part"] == "server"]
    assert server["note"].startswith("missing here: msgspec, pyzmq, llguidance, pydantic, ")
    measured = {finding["name"] for finding in found["findings"] if finding["state"] == "measured"}
    assert {
        "qwen3_5_text, a decode of 2 by our kernels",
        "decode attention, 64 sequences, shares of at least 512 keys",
        "prefill attention, 24 tokens after 5, ours",
        "1 sequences, sampled",
        "a recorded step of 64 tokens",
        "Llama-3.1-8B, 2 clients, 5/2 tokens",
        "Llama-3.1-8B, generate_batch, 2 × 5/2 tokens",
    } <= measured
    profile, _ = [finding for finding in found["findings"] if finding["name"].startswith("profile")]
    assert {"name", "on", "count", "device_us", "host_us"} == set(profile["data"]["by host"][0])
    assert "the cache holds" not in run.stdout
    assert "comparisons: 17 right, 0 wrong" in run.stdout


@pytest.mark.timeout(600)
def test_the_server_is_served_measured_and_disturbed_over_http(tmp_path: Path) -> None:
    pytest.importorskip("msgspec")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_check"),
        "--cpu-smoke",
        "--minutes",
        "60",
        "--only",
        "server",
    ]
    path = tmp_path / "out.json"
    run = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, check=False, timeout=550, cwd="/"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    findings = {finding["name"]: finding for finding in found_in(path)["findings"]}
    assert {name: finding["state"] for name, finding in findings.items()} == {
        "start of the server until it is ready": "measured",
        "8/2, 1 stream": "measured",
        "8/2, 2 streams": "measured",
        "8/2, busiest second of the busiest process": "measured",
        "blocks of cancelled streams are given back": "ok",
        "a card that another process fills": "ok",
        "kill -9: each stream ends with one error": "ok",
        "kill -9: requests get 503": "ok",
        "kill -9: until it serves again": "measured",
        "a second server on the same device serves or says why not": "ok",
        "the second server after the first has ended, until ready": "measured",
    }
    assert all(finding["value"] > 0 for finding in findings.values() if finding["state"] == "measured")


@pytest.mark.timeout(120)
def test_what_hangs_is_ended_and_what_was_found_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = gpu_check("--cpu-smoke", "--minutes", "9", "--only", "kernels", "--json", str(path), program=HANGING)
    assert run.returncode == 3, run.stdout + run.stderr
    found = found_in(path)
    assert [(finding["name"], finding["value"]) for finding in found["findings"]] == [
        ("copy, of the datasheet's bandwidth", 0.5)
    ]
    assert found["end"] == "ended by the watchdog after 9 minutes while at: kernels: what hangs"
    assert run.stdout.rstrip().endswith(found["end"])
    child = next(line.split()[1] for line in run.stdout.splitlines() if line.startswith("child "))
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "a process outlives the check"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    """Neither gone nor waiting for whoever collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(120)
def test_without_time_everything_is_named_as_left_out(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = gpu_check("--cpu-smoke", "--minutes", "0.001", "--json", str(path), program=f"{BEFORE}\n{PROGRAM}")
    assert run.returncode == 0, run.stdout + run.stderr
    found = found_in(path)
    assert {finding["state"] for finding in found["findings"]} == {"skipped"}
    assert {finding["part"] for finding in found["findings"]} == {
        "correctness",
        "kernels",
        "packed",
        "decode",
        "core",
        "peers",
    }
    assert "skipped decode: Llama-3.1-8B  (out of time: 0 s left for this part)" in run.stdout


def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = gpu_check()
    assert run.returncode == 2
    assert run.stderr == (
        "gpu_check: torch sees no CUDA GPU here; run this where nvidia-smi lists one, or with --cpu-smoke.\n"
    )


def test_a_part_that_does_not_exist_is_refused_before_anything_is_imported() -> None:
    run = gpu_check("--only", "kernels,speed")
    assert run.returncode == 2
    assert run.stderr == (
        "gpu_check: there is no part 'speed'; there are correctness, kernels, packed, decode, core, peers, server.\n"
    )
