"""How many prefill tokens fit into the next step, from what the last steps cost."""

from __future__ import annotations

# What a first step may carry before anything is measured: harmless on a laptop, enough to measure a GPU.
FIRST_CHUNK = 32
# Below this a chunk saves hardly any time.
MIN_CHUNK = 16
# Past this a GPU gains nothing, while activations grow and a wrong estimate costs more.
MAX_CHUNK = 4096
# A step without decodes keeps nobody's next token waiting, only arrivals and cancellations.
ALONE_FACTOR = 4
# How much longer than the base a step may take that also carries prefill: what others see of a long prompt's arrival.
# Where more sequences wait for their first token than get their next ones, as many times longer.
STRETCH = 2.2
# The least time that prefill may take, in units of the base.
MIN_SHARE = 0.5
# The most of a step with prefill that counts as its base.
MAX_BASE = 0.75
# Weight of the past against one new step: the estimates follow a change within some ten steps.
MEMORY = 0.8


class StepPacer:
    """Keeps steps that carry prefill beside decodes within ``target_ms`` milliseconds and ``STRETCH`` usual steps.

    A step is modelled as a base, the time of a step that only decodes, plus a price per prefill token. Both are moving
    estimates; the price is a ratio of decayed sums, so that a short chunk counts for little.
    """

    def __init__(self, target_ms: float) -> None:
        self._target = target_ms / 1000
        self._base_seconds = 0.0
        self._prefill_seconds = 0.0
        self._prefill_tokens = 0.0

    def prefill_budget(self, num_decodes: int, num_waiting: int = 1) -> int:
        """Prefill tokens for a step that also carries ``num_decodes`` decodes; at least ``MIN_CHUNK``.

        ``num_waiting`` sequences still have to compute their prompts.
        """
        if not self._prefill_tokens:
            return FIRST_CHUNK
        target = self._target_beside(num_decodes, num_waiting) if num_decodes else self._target * ALONE_FACTOR
        # Where the base alone reaches the target, prefill still gets a share of the time, or prompts would starve.
        seconds = max(target - self._base_seconds, self._base_seconds * MIN_SHARE)
        affordable = seconds * self._prefill_tokens / max(self._prefill_seconds, 1e-9)
        return int(min(max(affordable, MIN_CHUNK), MAX_CHUNK))

    def _target_beside(self, num_decodes: int, num_waiting: int) -> float:
        stretched = self._base_seconds * STRETCH * max(1.0, num_waiting / num_decodes)
        return min(self._target, stretched or self._target)

    def record(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a finished step."""
        if num_prefill_tokens:
            # Never the whole step to the base: an outdated estimate of it would make prefill look free.
            base = min(self._base_seconds, seconds * MAX_BASE)
            self._prefill_seconds = self._prefill_seconds * MEMORY + seconds - base
            self._prefill_tokens = self._prefill_tokens * MEMORY + num_prefill_tokens
        elif num_decodes:
            past = self._base_seconds or seconds
            self._base_seconds = past * MEMORY + seconds * (1 - MEMORY)
