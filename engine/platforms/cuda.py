"""Models on a GPU: fused operators, our attention kernels, a cache sized by a profile, recorded steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.device.cuda_health import DeviceError, device_errors
from engine.device.device_memory import advice_on, free_bytes, size, who_holds
from engine.failures import first_line
from engine.fused.linear import FuseLinears
from engine.model.loader import LoadedModel, Progress
from engine.model.rewrites import apply_rewrites
from engine.recurrent.proof import require_equal_states
from engine.recurrent.states import RecurrentStates
from engine.runner.cuda_graphs import CudaRecorder, Recorder, batch_sizes
from engine.runner.memory_profile import Attention, profile_steps
from engine.runner.torch_runner import ModelRunner
from engine.sampling.device import DeviceSampler
from engine.scheduling.chunk_budget import FittedCost, RecordedCost, StepCost
from engine.scheduling.contracts import Runner, Sampler

_log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # Triton has no e4m3 below
CACHE_SHARE = 0.92  # of what the largest steps have left free


class CudaPlatform:
    """``Platform`` of one GPU. ``attention`` and ``record`` replace our kernels and CUDA graphs in comparisons and in
    tests on a CPU."""

    max_running = 256  # with 64, each read of the weights yields little more than half of the tokens it could
    runs_ahead = True
    scratch_blocks = 1  # for the padding of recorded steps

    def __init__(
        self, device: torch.device, *, attention: Attention | None = None, record: Recorder | None = None
    ) -> None:
        self._device = device
        self._attention = attention
        self._record = record

    def check(self, config: EngineConfig) -> None:
        if config.kv_dtype != "fp8" or self._device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(self._device)
        if capability < FP8_CAPABILITY:
            raise ModelRefused(
                "kv_dtype is 'fp8', which takes compute capability {}.{} or higher, but {} has {}.{}; leave kv_dtype "
                "out".format(*FP8_CAPABILITY, self._device, *capability)
            )

    def rewrite(self, model: LoadedModel, progress: Progress) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # Triton, streams and graphs follow the current device, not the tensors
        progress("joining weights", 0.0)
        apply_rewrites(model, [FuseLinears()])
        try:
            from engine.fused.rewrites import FUSED_OPS
        except ImportError:
            return  # no Triton; ``triton_attention`` warns about it
        apply_rewrites(model, FUSED_OPS)

    def profile(
        self, model: LoadedModel, info: ModelInfo, config: EngineConfig, progress: Progress
    ) -> tuple[Attention, int]:
        progress("profiling the largest step", 0.0)
        return profile_steps(model, info, config, self._attention or triton_attention())

    def cache_bytes(self, kv_memory: float | None, reserved: int) -> int:
        """Default: 0.92 of the free memory."""
        free = free_bytes(self._device) - reserved
        if free <= 0:
            raise ModelRefused(
                f"no memory is left for a KV cache: the largest steps take {size(reserved)}, and "
                f"{who_holds(self._device)}; lower max_running, or {advice_on(self._device)}; servers that share a GPU "
                "need a kv_memory each"
            )
        if kv_memory is None or kv_memory <= 1:
            return int(free * (kv_memory or CACHE_SHARE))
        if kv_memory > free:
            raise ModelRefused(
                f"kv_memory is {int(kv_memory)} bytes, but {free} are free on {self._device} beside the weights and "
                f"{reserved} for steps ({who_holds(self._device)}); lower it, or give a share above 0 and up to 1"
            )
        return int(kv_memory)

    def bind(
        self,
        model: LoadedModel,
        attention: Attention,
        cache: KVCache,
        states: StateCache,
        info: ModelInfo,
        _config: EngineConfig,
        _progress: Progress,
        /,
    ) -> Runner:
        return ModelRunner(model, attention(cache), info, advancing(model, states))

    def capture(self, runner: Runner, scratch_blocks: Sequence[int], config: EngineConfig, progress: Progress) -> None:
        """Steps that cannot be recorded are launched kernel by kernel."""
        if not config.cuda_graphs:
            return
        assert isinstance(runner, ModelRunner)
        try:
            runner.record_steps(scratch_blocks, self._record or CudaRecorder(), progress)
        except RuntimeError as error:
            _warn("Steps with prefill" if runner.recorded_shapes else "Steps", error, runner)

    def sampler(self, runner: Runner, config: EngineConfig, /) -> Sampler:
        """Without a recording, its kernels are launched one by one too."""
        assert isinstance(runner, ModelRunner)
        info = runner.info
        sizes = batch_sizes(info.max_running)
        if runner.recorded is not None:
            logits = runner.recorded.logits
        else:
            logits = torch.zeros(info.max_running, info.vocab_size, device=self._device)
        try:
            if config.cuda_graphs:
                return DeviceSampler(logits, runner.sampled, sizes, self._record or CudaRecorder())
        except RuntimeError as error:
            _warn("Samplings", error, runner)
        return DeviceSampler(logits, runner.sampled, sizes)

    def step_cost(self, runner: Runner) -> StepCost:
        seconds = runner.recorded_seconds() if isinstance(runner, ModelRunner) else {}
        prefills = {shape.tokens: taken for shape, taken in seconds.items() if not shape.only_decodes}
        if not prefills:
            return FittedCost()
        return RecordedCost(prefills, min(taken for shape, taken in seconds.items() if shape.only_decodes))


def _warn(what: str, error: RuntimeError, runner: Runner) -> None:
    """Say that something could not be recorded. Raises ``EngineUnavailable`` if the device is lost."""
    runner.check()  # which also waits until nothing uses the memory of the recordings any more
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    reason = "there is no memory for it; lower kv_memory" if out_of_memory else first_line(error)
    _log.warning("%s are not recorded and will be slower: %s", what, reason)


def triton_attention() -> Attention:
    """Our kernels, unless Triton is missing."""
    try:
        from engine.attention.triton_paged import TritonAttention
    except ImportError as error:
        _log.warning("Triton cannot be imported (%s): attention copies the whole past at each step, slowly", error)
        return ReferenceAttention
    return TritonAttention


Advancing = Callable[[StateCache], RecurrentStates]


def advancing(model: LoadedModel, cache: StateCache) -> RecurrentStates:
    """What advances the recurrent states of a model: the fastest that is proved equal to its own mixers."""
    if not model.probe.mixers:
        return RecurrentStates(cache)
    hidden_size = model.module.config.get_text_config().hidden_size
    for what, make in _ways_to_advance(cache.device, model.module.dtype):
        try:
            with device_errors(cache.device):
                require_equal_states(model.probe.mixers, hidden_size, make)
        except (ModelRefused, DeviceError) as error:
            _log.warning("Recurrent layers are not computed by %s: %s", what, error)
        else:
            _log.info("Recurrent layers are computed by %s", what)
            return make(cache)
    _log.warning("Recurrent layers are computed by torch, slowly")
    return RecurrentStates(cache)


def _ways_to_advance(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Advancing]]:
    """The kernels that can be imported, fastest first, each with what the log calls it."""
    try:
        from engine.recurrent.flash_chunks import FlashChunks
        from engine.recurrent.triton_states import TritonStates
    except ImportError as error:
        _log.warning("Triton cannot be imported (%s)", error)
        return
    if device.type == "cuda" and dtype == torch.float32:
        _log.warning(
            "Recurrent layers compute chunks of prompts by torch, slowly: flash-linear-attention would round products "
            "of float32 to TF32; dtype bfloat16 is computed with it"
        )
        yield "our kernels", TritonStates
        return
    try:
        with device_errors(device):
            flash = FlashChunks()
    except DeviceError as error:
        _log.warning(
            "Recurrent layers compute chunks of prompts by torch, slowly: flash-linear-attention cannot be imported "
            "(%s); docs/gpu.md says how to install it",
            error,
        )
    else:
        yield "our kernels and flash-linear-attention", partial(TritonStates, flash=flash)
    yield "our kernels", TritonStates
