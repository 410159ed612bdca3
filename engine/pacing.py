"""How many prefill tokens fit into the next step, from what the last steps cost."""

from __future__ import annotations

from dataclasses import dataclass

# What the first steps may carry, of two sizes so that the fixed cost can be told from the price: harmless on a laptop,
# enough to measure a GPU.
FIRST_CHUNKS = (32, 64)
# Below this a chunk saves hardly any time.
MIN_CHUNK = 16
# Past this a GPU gains nothing, while activations grow and a wrong estimate costs more.
MAX_CHUNK = 4096
# A chunk is at most so many times as large as the largest one measured: nothing is extrapolated far.
GROWTH = 2
# How much longer than a step that only decodes one is meant to take that also carries prefill: what others see of a
# long prompt's arrival is then within three times, because steps vary. Where more sequences wait for their first token
# than get their next ones, as many times longer.
STRETCH = 2.6
# A step without decodes keeps nobody's next token waiting, only arrivals and cancellations.
ALONE_FACTOR = 4
# The most of a step that its fixed cost may be, beside decodes and alone: smaller chunks would mostly pay for steps.
FIXED_SHARE_BESIDE = 0.4
FIXED_SHARE_ALONE = 0.2
# Weight of the past against one new step: means follow a change within some ten steps.
MEMORY = 0.8
# A step counts as no more than so many usual ones of its size: one pause of the machine moves a mean by a twentieth.
PAUSE = 1.25
# How a size that is not measured any more fades against the others, with each step, and what remains of it: without a
# second size the fixed cost could not be told from the price.
FADING = 0.98
FADED = 0.02
# The most of a step that counts as a fixed cost that is known from decodes.
MAX_FIXED = 0.75
_TICK = 1e-9


class StepPacer:
    """Chooses the prefill of a step: large enough to be worth the step, small enough that decodes go on.

    Beside decodes a step may take ``STRETCH`` times a step that only decodes; where more sequences wait than decode,
    longer, up to ``target_ms`` milliseconds. Alone it may take ``ALONE_FACTOR`` times ``target_ms``. Whatever that
    allows, no chunk is so small that the fixed cost of its step is more than a share of it.

    ``alike`` says that steps with prefill are launched as those without are, as on a CPU: then the fixed cost is what
    decodes take. Fitted there it would be wrong, because the price of a token doubles along a long prompt.
    """

    def __init__(self, target_ms: float, *, alike: bool = False) -> None:
        self._target = target_ms / 1000
        self._alike = alike
        self._decode_seconds = 0.0
        self._cost = PrefillCost()

    def prefill_budget(self, num_decodes: int, num_waiting: int = 1) -> int:
        """Prefill tokens for a step that also carries ``num_decodes`` decodes; at least ``MIN_CHUNK``.

        ``num_waiting`` sequences still have to compute their prompts.
        """
        if self._cost.num_sizes < len(FIRST_CHUNKS):
            return FIRST_CHUNKS[self._cost.num_sizes]
        fixed, price = self._cost.beyond(self._decode_seconds) if self._alike else self._cost.line
        share = FIXED_SHARE_BESIDE if num_decodes else FIXED_SHARE_ALONE
        worthwhile = fixed * (1 / share - 1)
        seconds = max(self._allowed(num_decodes, num_waiting) - fixed, worthwhile)
        most = min(MAX_CHUNK, max(FIRST_CHUNKS[-1], GROWTH * self._cost.largest))
        return int(min(max(seconds / max(price, _TICK), MIN_CHUNK), most))

    def record(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a finished step."""
        if num_prefill_tokens:
            self._cost.add(num_prefill_tokens, seconds)
            if num_decodes and self._cost.num_sizes > 1 and not self._alike:
                # A step with prefill does all that one without it does. While prompts come without a pause, nothing
                # else tells that decodes have become cheaper.
                self._decode_seconds = min(self._decode_seconds, self._cost.line[0])
        elif num_decodes:
            past = self._decode_seconds or seconds
            self._decode_seconds = past * MEMORY + seconds * (1 - MEMORY)

    def _allowed(self, num_decodes: int, num_waiting: int) -> float:
        """How many seconds the step may take."""
        if not num_decodes:
            return self._target * ALONE_FACTOR
        beside = self._decode_seconds * STRETCH
        return max(beside, min(self._target, beside * num_waiting / num_decodes))


@dataclass(slots=True)
class _Mean:
    """Moving means over steps of about one size."""

    tokens: float
    seconds: float
    weight: float = 1.0


class PrefillCost:
    """Seconds of a step as ``fixed + price x tokens``, fitted to measured steps.

    A step has a cost that no chunk avoids: weights are read, kernels launched. Sizes are kept apart by powers of two,
    with a moving mean each, so that a thousand steps of one size do not make the others forgotten, and a line through
    the means is found by least squares of relative errors: a step that was slow for another reason counts for little.

    ``largest`` is the largest chunk measured, ``line`` the fixed seconds and the seconds a token; it takes two sizes.
    """

    def __init__(self) -> None:
        self.largest = 0
        self.line = (0.0, 0.0)
        self._means: dict[int, _Mean] = {}
        self._tokens = self._seconds = self._steps = 0.0

    @property
    def num_sizes(self) -> int:
        """How many sizes, by powers of two, were measured."""
        return len(self._means)

    def add(self, tokens: int, seconds: float) -> None:
        """Take a measured step with ``tokens`` of prefill into account."""
        self.largest = max(self.largest, tokens)
        seconds = max(seconds, _TICK)
        self._tokens = self._tokens * MEMORY + tokens
        self._seconds = self._seconds * MEMORY + seconds
        self._steps = self._steps * MEMORY + 1
        for mean in self._means.values():
            mean.weight = max(mean.weight * FADING, FADED)
        mean = self._means.setdefault(tokens.bit_length(), _Mean(tokens, seconds))
        mean.tokens = mean.tokens * MEMORY + tokens * (1 - MEMORY)
        mean.seconds = mean.seconds * MEMORY + min(seconds, PAUSE * mean.seconds) * (1 - MEMORY)
        mean.weight = 1.0
        self.line = self._fitted()

    def beyond(self, fixed: float) -> tuple[float, float]:
        """A known fixed cost, and the price of a token by the last steps of any size."""
        # Never all of the steps: one that is outdated would make prefill look free.
        fixed = min(fixed, MAX_FIXED * self._seconds / self._steps)
        return fixed, (self._seconds - fixed * self._steps) / self._tokens

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
