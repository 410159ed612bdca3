"""The goals, most of them shares of the card's own measured rates; and the rates of cards by their makers' datasheets.

Shares, because any card may be used; milliseconds and tokens a second are goals of one card, which their names say.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach, or with ``at_most`` not to exceed; ``least`` is what counts as good enough.

    Those with a ``unit`` of their own are for cards whose name contains ``card``.
    """

    part: str
    name: str
    goal: float
    least: float
    at_most: bool = False
    unit: str = "of 1"
    card: str = ""

    def ratio(self, measured: float) -> float:
        """1 where it is met exactly, more where it is exceeded."""
        if self.at_most:
            return self.goal / measured if measured > 0 else float("inf")
        return measured / self.goal

    def verdict(self, measured: float) -> str:
        """``met``, ``enough`` or ``missed``."""
        if self.ratio(measured) >= 1:
            return "met"
        enough = measured <= self.least if self.at_most else measured >= self.least
        return "enough" if enough else "missed"


COPY = Goal("kernels", "copy, of the datasheet's bandwidth", 0.90, 0.85)
LINEAR = Goal("kernels", "linear of 1 row, of the copy bandwidth", 0.97, 0.90)
ATTEND_DECODE = Goal("kernels", "decode attention, 64 × 4,096 tokens, of the copy bandwidth", 0.95, 0.80)
ATTEND_PREFILL = Goal("kernels", "prefill attention, 4,096 tokens, of the matrix rate", 0.45, 0.30)
DECODE_1 = Goal("decode", "1 sequence: weights read, of the datasheet's bandwidth", 0.75, 0.66)
DECODE_64 = Goal("decode", "64 sequences: weights and keys read, of the copy bandwidth", 0.81, 0.70)
DECODE_256 = Goal("decode", "256 sequences: weights and keys read, of the copy bandwidth", 0.80, 0.72)
STEP_64 = Goal("decode", "64 sequences: a step on an H100", 10.0, 11.5, at_most=True, unit="ms", card="H100")
PACE_256 = Goal("decode", "256 sequences: decode on an H100", 11_500, 10_000, unit="tok/s", card="H100")
SAMPLED_1 = Goal("decode", "1 sequence: sampled, of greedy", 0.97, 0.92)
SAMPLED_64 = Goal("decode", "64 sequences: sampled, of greedy", 0.97, 0.92)
SAMPLED_256 = Goal("decode", "256 sequences: sampled, of greedy", 0.97, 0.92)
PREFILL = Goal("decode", "prefill of 4 × 1,024 tokens, of the matrix rate", 0.70, 0.62)
RAGGED = Goal("decode", "step of 1 × 32,768 + 63 × 200 tokens, of a uniform one", 1.5, 2.5, at_most=True, unit="×")
ARRIVAL = Goal(
    "core", "8 decodes: their worst gap beside a prompt of 4,000, of alone", 3.0, 4.0, at_most=True, unit="×"
)
GRAMMAR = Goal("core", "63 free answers beside one with a grammar, of beside a free one", 0.95, 0.95)
GENERATE = Goal("peers", "8 sequences: our decode, of generate", 3.0, 2.0, unit="×")
GENERATE_BATCH = Goal("peers", "8 sequences: our decode, of generate_batch", 3.0, 2.0, unit="×")
HTTP = Goal("server", "0.6B, 64 clients 128/128 over HTTP, on an H100", 15_000, 8_000, unit="tok/s", card="H100")
PACKED_INT4 = Goal("packed", "1 row: products of an 8B's layers in int4, of those in bfloat16", 2.2, 1.8, unit="×")
GOALS = (
    COPY, LINEAR, ATTEND_DECODE, ATTEND_PREFILL,
    DECODE_1, DECODE_64, DECODE_256, STEP_64, PACE_256, SAMPLED_1, SAMPLED_64, SAMPLED_256, PREFILL, RAGGED,
    ARRIVAL, GRAMMAR, PACKED_INT4, GENERATE, GENERATE_BATCH, HTTP,
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
