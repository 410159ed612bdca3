"""The goals, as shares of the card's own measured rates; and the rates of cards by their makers' datasheets.

Shares, because any card may be used. All were derived from the code and its compiled kernels before the first run on a
GPU; ``source`` quotes the estimate. ``later`` is the share expected after the improvements that were listed then.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """A share to reach, or with ``at_most`` not to exceed."""

    part: str
    name: str
    expected: float
    source: str
    later: float | None = None
    at_most: bool = False

    def ratio(self, measured: float) -> float:
        """1 where it is met exactly, more where it is exceeded."""
        if self.at_most:
            return self.expected / measured if measured > 0 else float("inf")
        return measured / self.expected


COPY = Goal("kernels", "copy, of the datasheet's bandwidth", 0.90, "8B bf16 on H100: copy 3.0 TB/s (of 3.35)")
LINEAR = Goal(
    "kernels", "linear of 1 row, of the copy bandwidth", 0.90, "15.0 GB a token, floor 5.0 ms: reading is all", 1.0
)
ATTEND_DECODE = Goal(
    "kernels",
    "decode attention, 64 × 4,096 tokens, of the copy bandwidth",
    0.60,
    "decode attention is single-buffered: 64 sequences take 12.4 ms where 8.1 is the floor",
    0.80,
)
ATTEND_PREFILL = Goal(
    "kernels",
    "prefill attention, 4,096 tokens, of the matrix rate",
    0.19,
    "64-row tiles, masks on every tile: 150–220 TFLOP/s (of 798) where FA2 has 350–400",
    0.45,
)
DECODE_1 = Goal(
    "decode",
    "1 sequence: weights read, of the datasheet's bandwidth",
    0.66,
    "batch 1: 6.8 ms, 145 tok/s = 66 % of the datasheet; with 1–4 6.3 ms, 71 %",
    0.71,
)
DECODE_64 = Goal(
    "decode",
    "64 sequences: weights and keys read, of the copy bandwidth",
    0.65,
    "64, decode: 12.4 ms; with 1–4 10.0 ms; floor 8.1 ms",
    0.81,
)
DECODE_256 = Goal(
    "decode",
    "256 sequences: weights and keys read, of the copy bandwidth",
    0.64,
    "256, decode: 27 ms; with 1–4 21.6 ms; floor 17.2 ms",
    0.80,
)
SAMPLED_1 = Goal("decode", "1 sequence: sampled, of greedy", 0.93, "batch 1: 145 tok/s (sampled 135)", 0.99)
SAMPLED_64 = Goal("decode", "64 sequences: sampled, of greedy", 0.94, "64, decode: 5.1k tok/s (sampled 4.8k)", 0.99)
SAMPLED_256 = Goal("decode", "256 sequences: sampled, of greedy", 0.94, "256, decode: 9.4k tok/s (sampled 8.8k)", 0.99)
PREFILL = Goal(
    "decode",
    "prefill of 4 × 1,024 tokens, of the matrix rate",
    0.61,
    "prefill 4 × 1,024: 35k tok/s, 61 % of the matrix rate; with 1–4 70 %",
    0.70,
)
ARRIVAL = Goal(
    "core",
    "8 decodes: time of a token beside a long prompt, of alone",
    3.0,
    "beside decodes the largest chunk that keeps the step within 3 × a decode step",
    at_most=True,
)
HTTP = Goal(
    "server",
    "64 streams over HTTP, of the core in process",
    0.90,
    "HTTP, process border and client cost at most 10 % at 64 streams",
)
GOALS = (
    COPY, LINEAR, ATTEND_DECODE, ATTEND_PREFILL,
    DECODE_1, DECODE_64, DECODE_256, SAMPLED_1, SAMPLED_64, SAMPLED_256, PREFILL,
    ARRIVAL, HTTP,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Datasheet:
    """GB/s of memory, and TFLOP/s of dense bfloat16 products where known."""

    gb_s: float
    tflops: float | None = None


# The first line whose words all occur in the device's name counts.
DATASHEETS: tuple[tuple[str, Datasheet], ...] = (
    ("B200", Datasheet(8000, 2250)),
    ("GH200", Datasheet(4000, 989)),
    ("H200 NVL", Datasheet(4800, 835)),
    ("H200", Datasheet(4800, 989)),
    ("H100 NVL", Datasheet(3938, 835)),
    ("H100 PCIe", Datasheet(2000, 756)),
    ("H100", Datasheet(3350, 989)),
    ("A100 80GB SXM4", Datasheet(2039, 312)),
    ("A100 80GB PCIe", Datasheet(1935, 312)),
    ("A100", Datasheet(1555, 312)),
    ("L40S", Datasheet(864)),
    ("L40", Datasheet(864)),
    ("L4", Datasheet(300)),
    ("A10G", Datasheet(600)),
    ("A10", Datasheet(600)),
    ("RTX 5090", Datasheet(1792)),
    ("RTX 4090", Datasheet(1008)),
    ("RTX 3090", Datasheet(936)),
    ("RTX A6000", Datasheet(768)),
)


def datasheet(name: str) -> Datasheet | None:
    """The datasheet of a device, by its name; None for one that is not in the table."""
    words = name.replace("-", " ").split()
    return next((sheet for device, sheet in DATASHEETS if all(word in words for word in device.split())), None)
