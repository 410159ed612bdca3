"""Plots of a run: throughput, TTFT and inter-token latency by load, one line for each server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.bench.results.findings import Results

PANELS = (
    ("Output tokens/s", (("output_tokens_per_second", "-", ""),), 1.0, "linear"),
    ("Time to first token, ms", (("ttft_p50", "-", "p50"), ("ttft_p99", "--", "p99")), 1000.0, "log"),
    ("Inter-token latency, ms", (("itl_p50", "-", "p50"), ("itl_p99", "--", "p99")), 1000.0, "log"),
)
COLOURS = {"castor": "tab:blue", "llama.cpp": "tab:orange", "llama.cpp-native": "tab:red", "transformers": "tab:green"}


def can_plot() -> bool:
    """Whether the library for plots is installed."""
    return find_spec("matplotlib") is not None


def plot(results: Results, title: str, path: Path) -> None:
    """Write the plots as a PNG. Bars over the rounds run from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 4.5), layout="constrained")
    for axis, (label, lines, factor, scale) in zip(axes, PANELS, strict=True):
        drawn = [
            _line(axis, results, server, number, style, f"{server} {name}".strip(), factor)
            for server in results.servers
            for number, style, name in lines
        ]
        axis.set_title(label)
        axis.set_xticks(range(len(results.loads)), results.loads, rotation=20)
        axis.grid(alpha=0.3, which="both")
        if any(drawn):  # a logarithmic axis without a value cannot be drawn
            axis.set_yscale(scale)
            axis.legend(fontsize=8)
        if scale == "linear":
            axis.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axis: Any, results: Results, server: str, number: str, style: str, label: str, factor: float) -> bool:
    """Draw a server's line; whether there was anything to draw."""
    by_load = {total.load: total.numbers for total in results.totals() if total.server == server}
    found = [(place, by_load.get(load, {}).get(number)) for place, load in enumerate(results.loads)]
    points = [(place, value) for place, value in found if value is not None and value.least > 0]
    if points:
        axis.errorbar(
            [place for place, _ in points],
            [value.median * factor for _, value in points],
            yerr=[
                [(value.median - value.least) * factor for _, value in points],
                [(value.most - value.median) * factor for _, value in points],
            ],
            fmt=f"o{style}",
            capsize=3,
            color=COLOURS.get(server),
            label=label,
        )
    return bool(points)
