"""The contract between the start-up recipe and the platforms that it starts models on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.api.engine import EngineConfig, ModelInfo
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.model.loader import LoadedModel, Progress
from engine.runner.memory_profile import Attention
from engine.scheduling.chunk_budget import StepCost
from engine.scheduling.contracts import Runner, Sampler


class Platform(Protocol):
    """A kind of device. The methods are in the order in which ``engine.platforms.recipe`` calls them."""

    max_running: int
    """Sequences that run at once by default."""
    scratch_blocks: int
    """Blocks of the cache that no sequence gets, and slots for states."""
    runs_ahead: bool
    """Whether steps are launched before the tokens of the one before are read."""

    def check(self, config: EngineConfig) -> None:
        """Raises ``ModelRefused`` for an option that this device does not have, before anything is loaded."""
        ...

    def rewrite(self, model: LoadedModel, progress: Progress) -> None:
        """Replace parts of the model by faster ones that compute the same numbers."""
        ...

    def profile(
        self, model: LoadedModel, info: ModelInfo, config: EngineConfig, progress: Progress, /
    ) -> tuple[Attention, int]:
        """The attention backend that runs here, and the bytes to keep for the largest step beside weights and cache.

        Raises ``ModelRefused`` if the memory does not even hold that step.
        """
        ...

    def cache_bytes(self, kv_memory: float | None, reserved: int) -> int:
        """Bytes for the cache.

        A ``kv_memory`` above 1 is bytes, one up to 1 is a share of what is free and not ``reserved``, None is the
        platform's default. Raises ``ModelRefused`` for more than the device can give.
        """
        ...

    def bind(
        self,
        model: LoadedModel,
        attention: Attention,
        cache: KVCache,
        states: StateCache,
        info: ModelInfo,
        config: EngineConfig,
        progress: Progress,
        /,
    ) -> Runner:
        """The runner that computes the model over the caches.

        Raises ``WeightsGone`` if the model has to be loaded again and computed by transformers' own modules.
        """
        ...

    def capture(self, runner: Runner, scratch_blocks: Sequence[int], config: EngineConfig, progress: Progress) -> None:
        """Record the steps of a runner that ``bind`` returned, where the platform replays them; ``scratch_blocks`` are
        one of each layer group."""
        ...

    def sampler(self, runner: Runner, config: EngineConfig, /) -> Sampler:
        """What chooses the tokens of a runner that ``capture`` is done with."""
        ...

    def step_cost(self, runner: Runner, /) -> StepCost:
        """How the cost of a step follows from its prefill tokens, to be learned from the steps of one engine.

        What ``runner`` has recorded is measured at once.
        """
        ...
