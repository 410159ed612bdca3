"""Models on a CPU: C code where it computes the model's own numbers, else transformers' modules."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.model.loader import LoadedModel, Progress
from engine.native.errors import NotNative, WeightsGone
from engine.platforms import machine
from engine.recurrent.states import RecurrentStates
from engine.runner.memory_profile import Attention
from engine.runner.torch_runner import ModelRunner
from engine.sampling import BatchSampler
from engine.scheduling.chunk_budget import CostOverDecodes, StepCost
from engine.scheduling.contracts import Runner, Sampler

_log = logging.getLogger(__name__)


class CpuPlatform:
    """``Platform`` of the processor."""

    max_running = machine.MAX_RUNNING
    scratch_blocks = 0
    runs_ahead = False  # nothing computes while the host does something else

    def check(self, config: EngineConfig) -> None:
        if config.kv_dtype == "fp8":
            raise ModelRefused(
                "kv_dtype is 'fp8', but on a CPU keys and values keep the type of the model; leave kv_dtype out, or "
                "set device to a GPU of compute capability 8.9 or higher"
            )

    def rewrite(self, model: LoadedModel, progress: Progress) -> None:
        """Nothing: no operator costs more to launch than to compute here, and the C code needs the model as it is."""

    def profile(
        self, _model: LoadedModel, _info: ModelInfo, _config: EngineConfig, _progress: Progress, /
    ) -> tuple[Attention, int]:
        """Nothing is kept for steps: the default of ``cache_bytes`` leaves room for them."""
        return ReferenceAttention, 0

    def cache_bytes(self, kv_memory: float | None, reserved: int) -> int:
        return machine.cache_bytes(kv_memory, reserved)

    def bind(
        self,
        model: LoadedModel,
        attention: Attention,
        cache: KVCache,
        states: StateCache,
        info: ModelInfo,
        config: EngineConfig,
        progress: Progress,
    ) -> Runner:
        # Imported late: an image for GPUs may lack what only the C forward needs (gguf).
        from engine.native.build import native_runner, native_states

        level = logging.WARNING if config.native else logging.INFO
        try:
            return native_runner(model, cache, info, config, progress)
        except WeightsGone:
            raise
        except NotNative as reason:
            _log.log(level, "Computed by torch, which is slower, and not natively: %s", str(reason))
        advancing = RecurrentStates(states)
        if model.probe.mixers:
            try:
                advancing = native_states(model, states, config)
            except NotNative as reason:
                _log.log(level, "Recurrent states are advanced by torch, which is slower: %s", str(reason))
        return ModelRunner(model, attention(cache), info, advancing)

    def capture(self, runner: Runner, scratch_blocks: Sequence[int], config: EngineConfig, progress: Progress) -> None:
        """Nothing: a CPU has no launches to save."""

    def sampler(self, _runner: Runner, _config: EngineConfig, /) -> Sampler:
        return BatchSampler()

    def step_cost(self, _runner: Runner, /) -> StepCost:
        return CostOverDecodes()
