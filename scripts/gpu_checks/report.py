"""Results as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from gpu_checks.correctness import Finding
from gpu_checks.speed import Result


def finding_line(finding: Finding) -> str:
    """One comparison."""
    verdict = "ok" if finding.holds else "WRONG"
    note = f"  ({finding.note})" if finding.note else ""
    return f"  {verdict:5}  {finding.name:48} {finding.worst:.1e}  allowed {finding.allowed:.0e}{note}"


def result_lines(result: Result) -> list[str]:
    """The table of one model."""
    lines = [
        f"{result.model}: {result.parameters / 1e9:.2f}e9 parameters, "
        f"{result.weight_bytes / 1e9:.2f} GB read for each token",
        f"  copy bandwidth, measured      {result.copy_gb_s:10.0f} GB/s"
        + (f"   datasheet {result.datasheet_gb_s:.0f} GB/s" if result.datasheet_gb_s else "   datasheet not known"),
        f"  matrix rate, measured         {result.matmul_tflops:10.1f} TFLOP/s",
        f"  1 sequence, decode            {result.decode.get(1, 0):10.1f} tok/s  "
        f"{_percent(result.share(result.copy_gb_s))} of the copy bandwidth, "
        f"{_percent(result.share(result.datasheet_gb_s))} of the datasheet",
        f"  prefill                       {result.prefill_tok_s:10.0f} tok/s  "
        f"{_percent(result.prefill_share)} of the matrix rate",
        f"  decode steps recorded         {'yes' if result.recorded else 'NO':>10}",
        "  sequences   answers tok/s   decode tok/s   decode tok/s without recorded steps",
    ]
    for batch, throughput in result.throughput.items():
        eager = f"{result.decode_eager[batch]:14.1f}" if batch in result.decode_eager else ""
        lines.append(f"  {batch:9} {throughput:15.1f} {result.decode[batch]:14.1f}   {eager}")
    return [*lines, *(f"  skipped: {reason}" for reason in result.skipped)]


def write_json(path: Path, environment: dict[str, str], findings: list[Finding], results: list[Result]) -> None:
    """Everything that was found."""
    document = {
        "environment": environment,
        "correctness": [{**finding._asdict(), "holds": finding.holds} for finding in findings],
        "speed": [
            {
                **asdict(result),
                "share_of_copy": result.share(result.copy_gb_s),
                "share_of_datasheet": result.share(result.datasheet_gb_s),
            }
            for result in results
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f} %"
