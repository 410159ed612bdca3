"""How many prefill tokens fit into the next step, from what the last steps cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

# The chunk sizes of the first steps. Two, so that the fixed cost can be separated from the price of a token: harmless
# on a laptop, enough to measure a GPU.
FIRST_CHUNKS = (32, 64)
# Below this a chunk saves hardly any time.
MIN_CHUNK = 16
# Past this a GPU gains nothing, while activations grow and a wrong estimate costs more.
MAX_CHUNK = 4096
# Where steps are launched before the one before is read, so many are under way.
AHEAD = 2
# A chunk is at most this many times as large as the largest one measured: nothing is extrapolated far.
GROWTH = 2
# How many times as long as a decode-only step a step with decodes and prefill should take. Steps vary, so this keeps
# the pause that others see when a long prompt arrives within three times. Where more sequences wait for their first
# token than decode, the factor grows by their ratio.
STRETCH = 2.6
# A step without decodes delays no sequence's next token, only arrivals and cancellations.
ALONE_FACTOR = 4
# The largest share of a step that its fixed cost may take, beside decodes and alone: smaller chunks mostly pay for it.
FIXED_SHARE_BESIDE = 0.4
FIXED_SHARE_ALONE = 0.2
# Weight of the past against one new step: means follow a change within about ten steps.
MEMORY = 0.8
# A step counts as at most this many times the mean of its size: one pause of the machine moves a mean by a twentieth.
PAUSE = 1.25
# How the weight of a size that is no longer measured fades with each step, and the weight that remains: without a
# second size the fixed cost could not be separated from the price.
FADING = 0.98
FADED = 0.02
# The largest share of a step that a fixed cost known from decodes may take.
MAX_FIXED = 0.75
_TICK = 1e-9


class StepPacer:
    """Chooses the prefill of a step: large enough to be worth the step, small enough not to hold up decodes.

    Beside decodes a step may take ``STRETCH`` times a step that only decodes; where more sequences wait than decode,
    longer, up to ``target_ms`` milliseconds. Alone it may take ``ALONE_FACTOR`` times ``target_ms``. Whatever that
    allows, no chunk is so small that the fixed cost of its step is more than a share of it.
    """

    def __init__(self, target_ms: float, cost: StepCost) -> None:
        self._target = target_ms / 1000
        self._cost = cost

    def prefill_budget(self, num_decodes: int, num_waiting: int = 1) -> int:
        """Prefill tokens for a step that also carries ``num_decodes`` decodes; at least ``MIN_CHUNK``.

        ``num_waiting`` sequences still have to compute their prompts.
        """
        if not num_decodes:
            return self._cost.chunk_within(self._target * ALONE_FACTOR, 0)
        beside = self._cost.decodes * STRETCH
        return self._cost.chunk_within(max(beside, min(self._target, beside * num_waiting / num_decodes)), num_decodes)

    def record(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a finished step."""
        self._cost.add(num_decodes, num_prefill_tokens, max(seconds, _TICK))


def most_launched(*, ahead: bool) -> int:
    """The most tokens of one sequence that may be computed and not committed, with steps launched ``ahead`` or not."""
    return AHEAD * MAX_CHUNK if ahead else MAX_CHUNK


class StepCost(ABC):
    """Seconds of a step as ``fixed + price x tokens`` of prefill, from measured steps.

    A step has a cost that no chunk avoids: weights are read, kernels launched. ``decodes`` is the mean of the last
    steps that only decode, ``largest`` the largest chunk measured.
    """

    def __init__(self) -> None:
        self.decodes = 0.0
        self.largest = 0

    @property
    @abstractmethod
    def first_chunk(self) -> int | None:
        """The chunk to measure next, while too little is known for a ``line``."""

    @property
    @abstractmethod
    def line(self) -> tuple[float, float]:
        """The fixed seconds, and the seconds per token."""

    def chunk_within(self, seconds: float, num_decodes: int) -> int:
        """Prefill tokens for a step that should take ``seconds`` and also carries ``num_decodes`` decodes."""
        if self.first_chunk:
            return self.first_chunk
        fixed, price = self.line
        share = FIXED_SHARE_BESIDE if num_decodes else FIXED_SHARE_ALONE
        worthwhile = fixed * (1 / share - 1)
        most = min(MAX_CHUNK, max(FIRST_CHUNKS[-1], GROWTH * self.largest))
        return int(min(max(max(seconds - fixed, worthwhile) / max(price, _TICK), MIN_CHUNK), most))

    def add(self, num_decodes: int, tokens: int, seconds: float) -> None:
        """Learn from a step with ``num_decodes`` decodes and ``tokens`` of prefill; ``seconds`` is above 0."""
        if tokens:
            self.largest = max(self.largest, tokens)
        elif num_decodes:
            past = self.decodes or seconds
            self.decodes = past * MEMORY + seconds * (1 - MEMORY)


class CostOverDecodes(StepCost):
    """For devices that launch steps with prefill like those without, such as a CPU: a decode step is the fixed cost.

    A fit would be wrong there, because the price of a token doubles along a long prompt; the price comes from the last
    steps of any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tokens = self._seconds = self._steps = 0.0

    @property
    def first_chunk(self) -> int | None:
        return None if self._steps else FIRST_CHUNKS[0]

    @property
    def line(self) -> tuple[float, float]:
        # Never the whole step: outdated decodes would make prefill look free.
        fixed = min(self.decodes, MAX_FIXED * self._seconds / self._steps)
        return fixed, (self._seconds - fixed * self._steps) / self._tokens

    def add(self, num_decodes: int, tokens: int, seconds: float) -> None:
        super().add(num_decodes, tokens, seconds)
        if tokens:
            self._tokens = self._tokens * MEMORY + tokens
            self._seconds = self._seconds * MEMORY + seconds
            self._steps = self._steps * MEMORY + 1


@dataclass(slots=True)
class _Mean:
    """Moving means over steps of about one size."""

    tokens: float
    seconds: float
    weight: float = 1.0


class FittedCost(StepCost):
    """For devices that launch steps with prefill differently, such as a GPU: their fixed cost is fitted.

    Sizes are grouped by powers of two, with a moving mean each, so that a thousand steps of one size do not displace
    the others. A line is fitted through the means by least squares of relative errors: a step that was slow for another
    reason counts for little.
    """

    def __init__(self) -> None:
        super().__init__()
        self._line = (0.0, 0.0)
        self._means: dict[int, _Mean] = {}

    @property
    def first_chunk(self) -> int | None:
        num_sizes = len(self._means)
        return FIRST_CHUNKS[num_sizes] if num_sizes < len(FIRST_CHUNKS) else None

    @property
    def line(self) -> tuple[float, float]:
        return self._line

    def add(self, num_decodes: int, tokens: int, seconds: float) -> None:
        super().add(num_decodes, tokens, seconds)
        if not tokens:
            return
        for mean in self._means.values():
            mean.weight = max(mean.weight * FADING, FADED)
        mean = self._means.setdefault(tokens.bit_length(), _Mean(tokens, seconds))
        mean.tokens = mean.tokens * MEMORY + tokens * (1 - MEMORY)
        mean.seconds = mean.seconds * MEMORY + min(seconds, PAUSE * mean.seconds) * (1 - MEMORY)
        mean.weight = 1.0
        self._line = self._fitted()
        if num_decodes and not self.first_chunk:
            # A step with prefill does all that one without it does. While prompts come without a pause, nothing else
            # shows that decodes have become cheaper.
            self.decodes = min(self.decodes, self._line[0])

    def _fitted(self) -> tuple[float, float]:
        """Minimises the sum of weight x (1 - (fixed + price x tokens) / seconds)² with neither below 0."""
        u = v = uu = vv = uv = 0.0
        for mean in self._means.values():
            a, b = 1 / mean.seconds, mean.tokens / mean.seconds
            u, v = u + mean.weight * a, v + mean.weight * b
            uu, vv, uv = uu + mean.weight * a * a, vv + mean.weight * b * b, uv + mean.weight * a * b
        determinant = uu * vv - uv * uv
        fixed, price = (u * vv - v * uv, v * uu - u * uv) if determinant > 0 else (0.0, 1.0)
        if fixed <= 0:
            return 0.0, v / vv
        if price <= 0:
            return u / uu, 0.0
        return fixed / determinant, price / determinant


class RecordedCost(FittedCost):
    """For devices that replay steps of a few sizes, to which others are padded.

    ``sizes`` are the seconds of each by its tokens, decodes included, and ``decode`` those of the smallest step that
    only decodes: measured before the first request, with short sequences and without sampling. So the first chunk is
    already a good one. Two things come on top and are learned. Sampling and the past of the decodes cost as much as
    beside no prefill. The past of a long prompt makes each of its tokens dearer.

    A step has exactly the tokens of a size, so that nothing is computed for padding, and never more than the largest:
    that would be launched kernel by kernel. Where decodes leave no room in it, steps are as ``FittedCost`` has them.
    """

    def __init__(self, sizes: Mapping[int, float], decode: float) -> None:
        super().__init__()
        self.decodes = self._decode = decode
        self._sizes = dict(sorted(sizes.items()))
        self._tokens = self._excess = 0.0

    def chunk_within(self, seconds: float, num_decodes: int) -> int:
        sizes = [size for size in self._sizes if size - num_decodes >= MIN_CHUNK]
        if not sizes:
            return super().chunk_within(seconds, num_decodes)
        costs = {size: self._plain(size) + self._dearer * (size - num_decodes) for size in sizes}
        share = FIXED_SHARE_BESIDE if num_decodes else FIXED_SHARE_ALONE
        allowed = max(seconds, costs[sizes[0]] / share)
        return max((size for size in sizes if costs[size] <= allowed), default=sizes[0]) - num_decodes

    def add(self, num_decodes: int, tokens: int, seconds: float) -> None:
        size = next((size for size in self._sizes if size >= num_decodes + tokens), None)
        if not tokens or size is None:
            super().add(num_decodes, tokens, seconds)
        elif num_decodes:  # alone, the step lacks what comes with decodes
            # As long as prompts come without a pause, nothing else shows that decodes have become cheaper.
            self.decodes = max(self._decode, min(self.decodes, seconds - self._sizes[size] + self._decode))
            plain = self._plain(size)
            most = PAUSE * (plain + self._dearer * tokens)
            self._excess = self._excess * MEMORY + min(seconds, most) - plain
            self._tokens = self._tokens * MEMORY + tokens

    @property
    def _dearer(self) -> float:
        """Seconds that the past of prompts adds to each token of prefill."""
        return max(0.0, self._excess / self._tokens) if self._tokens else 0.0

    def _plain(self, size: int) -> float:
        """Seconds of a step of this size whose prompts have no past."""
        return self._sizes[size] + max(0.0, self.decodes - self._decode)
