"""``castor bench`` against a server, and how busy each process is meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.product.serving import ROOT, Served, cores_of, environment

PART = "server"
GOAL_LOAD = "128/128, 64 streams"
_WINDOW_SECONDS = 1.0
_LOOK_SECONDS = 0.1


def measure(check: Check, served: Served, lengths: str, options: list[str], results: Path) -> None:
    """Measure one load; ``lengths`` names prompt and answer tokens. Bounded by the part's time."""
    if not check.has_time(PART, f"the load {lengths}", 8.0):
        return
    command = [sys.executable, "-m", "server.cli", "bench", served.url, *options, "--rounds", "1"]
    output = results.with_suffix(".log")
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--output", str(results)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(),
            cwd=ROOT,
        )
    check.children.append(process)
    os.sched_setaffinity(process.pid, cores_of()[1])
    pids = {"front end": served.process.pid, "engine": served.engine_pid(), "client": process.pid}
    busiest = _busiest_second(check, process, {name: pid for name, pid in pids.items() if pid is not None})
    if process.poll() is None:
        process.kill()
        process.wait()
        check.report.skipped(PART, lengths, "out of time: the load was under way")
        return
    written = sorted(results.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if process.returncode or not written:
        check.report.failed(PART, lengths, " | ".join(output.read_text(errors="replace").strip().splitlines()[-3:]))
        return
    document: dict[str, Any] = json.loads(written[-1].read_text("utf-8"))
    for measurement in document["measurements"]:
        _report(check, lengths, measurement)
    cores = ", ".join(f"{name} {share:.2f}" for name, share in busiest.items())
    apart = "on cores of its own" if cores_of()[0].isdisjoint(cores_of()[1]) else "on the same cores"
    name = f"{lengths}, busiest second of the busiest process"
    check.report.number(PART, name, max(busiest.values(), default=0.0), "cores", f"{cores}; the client is {apart}")


def _report(check: Check, lengths: str, measurement: dict[str, Any]) -> None:
    summary = measurement["summary"]
    name, speed = f"{lengths}, {measurement['load']}", summary["output_tokens_per_second"]
    seconds = {key: summary[key] for key in ("ttft_p50", "itl_p50", "itl_p99") if summary[key] is not None}
    note = ", ".join(f"{key} {value * 1e3:.1f} ms" for key, value in seconds.items())
    if summary["errors"]:
        check.report.failed(PART, name, f"{summary['errors']} of {summary['requests']} requests failed")
    check.report.number(PART, name, speed, "tok/s", note, measurement["numbers"])
    if name == GOAL_LOAD and goals.HTTP.card in check.machine.name:
        check.report.share(goals.HTTP, speed)


def _busiest_second(check: Check, process: subprocess.Popen[bytes], pids: dict[str, int]) -> dict[str, float]:
    """The most cores that each process used over a second, until ``process`` ends or the part's time does."""
    seen: list[tuple[float, dict[str, float]]] = []
    most = dict.fromkeys(pids, 0.0)
    while process.poll() is None and check.budget.left > 0:
        seen.append((time.monotonic(), {name: _cpu_seconds(pid) for name, pid in pids.items()}))
        then = next((past for past in reversed(seen) if seen[-1][0] - past[0] >= _WINDOW_SECONDS), None)
        if then is not None:
            passed = seen[-1][0] - then[0]
            for name in pids:
                most[name] = max(most[name], (seen[-1][1][name] - then[1][name]) / passed)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_SECONDS)
    return most


def _cpu_seconds(pid: int) -> float:
    """What a process has used of the processor with all its threads; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
