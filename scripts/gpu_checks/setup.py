"""Models from configurations with random weights, and the machine that they run on."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.attention import seam
from engine.attention.probe import probe, set_attention
from engine.attention.reference import ReferenceAttention
from engine.batch import Sequence
from engine.gpu import gpu_runner
from engine.graphs import Recorder
from engine.model import LoadedModel
from engine.runner import ModelRunner
from engine.trial import Attention
from engine.types import EngineConfig, Request, SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks run. ``smoke`` is a run on a CPU that exercises the code; its numbers mean nothing."""

    device: torch.device
    smoke: bool
    attention: Attention
    record: Recorder | None

    @property
    def name(self) -> str:
        return "CPU, smoke run" if self.smoke else torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        """Until the device has done everything."""
        if not self.smoke:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give back the memory of what has no owner any more."""
        gc.collect()
        if not self.smoke:
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes until the device is done."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started


def environment(machine: Machine) -> dict[str, str]:
    """What a result depends on."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "missing"
    return {
        "device": machine.name,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "transformers": str(transformers.__version__),
        "triton": triton_version,
        "python": sys.version.partition(" ")[0],
        "system": platform.platform(),
    }


def random_model(model_type: str, dtype: torch.dtype, device: torch.device, lively: bool, **config: Any) -> LoadedModel:
    """A model of that configuration, the same weights for the same arguments.

    ``lively`` makes scores large enough for windows, caps and sinks of tiny models to matter.
    """
    torch.manual_seed(0)
    seam.register()
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config), dtype=dtype).eval()
    module.requires_grad_(False)
    if lively:
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name:
                parameter.mul_(6.0)
    layers = module.config.get_text_config().num_hidden_layers
    return LoadedModel(module, probe(module, layers), int(module.config.max_position_embeddings), "", ())


@torch.inference_mode()
def plain_logits(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, [tokens, vocabulary], by transformers' own code; not for a model of a runner."""
    for layer in model.probe.layers:
        code = sys.modules[type(layer.module).__module__]
        rotate = vars(code).get("apply_rotary_pos_emb")
        # A runner of the same family puts ours there, for all models of that code.
        if hasattr(rotate, "castor_original"):
            vars(code)["apply_rotary_pos_emb"] = rotate.castor_original
    set_attention(model.module, "eager")
    ids = torch.tensor([tokens], device=model.module.device)
    logits: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits[0].float()
    set_attention(model.module, seam.PAGED)
    return logits


def make_runner(machine: Machine, model: LoadedModel, max_context: int, **config: Any) -> ModelRunner:
    """The engine's own runner over ``model``. ``config`` are fields of ``EngineConfig`` and an ``attention``.

    Where its kernels do not run, the engine falls back; a check must ask ``uses`` what came of it.
    """
    attention = config.pop("attention", machine.attention)
    given = EngineConfig(path="", device=str(machine.device), max_context=max_context, block_size=BLOCK_SIZE, **config)
    model = LoadedModel(model.module, model.probe, min(model.max_context, max_context), "", ())
    return gpu_runner(model, given, (), lambda *_: None, attention=attention, record=machine.record)


def uses(machine: Machine, runner: ModelRunner) -> str:
    """What is wrong with a runner's attention, if it is not the machine's; else nothing."""
    fell_back = isinstance(runner.attention, ReferenceAttention) and machine.attention is not ReferenceAttention
    return "the Triton kernels do not run here" if fell_back else ""


class Pages:
    """Hands out the blocks of a runner's cache."""

    def __init__(self, runner: ModelRunner) -> None:
        self._free = list(range(runner.info.num_blocks))

    def holds(self, sequences: int, tokens: int) -> bool:
        """Whether so many sequences of so many tokens fit."""
        return sequences * -(-tokens // BLOCK_SIZE) <= len(self._free)

    def sequence(self, tokens: list[int], room: int) -> Sequence:
        """A sequence with blocks for ``room`` tokens."""
        blocks = [self._free.pop() for _ in range(-(-room // BLOCK_SIZE))]
        return Sequence(Request("check", (tokens[0],), GREEDY), 0, list(tokens), blocks=blocks)
