"""Models from configurations with random weights, and the engine's own runner over them."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.gather import ReferenceAttention
from engine.model import attention_hook
from engine.model.latent import keep_latents
from engine.model.loader import LoadedModel
from engine.model.probe import probe, set_attention
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import start_model
from engine.runner.torch_runner import ModelRunner
from engine.sampling.device import DeviceSampler
from engine.scheduling.sequence import Sequence
from gpu_checks.machine import Machine

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
BLOCK_SIZE = 16
# The spread of a random model's logits: a trained one is about as sure of its next token.
_SURE = 8.0
# The limits of the runner in the speed parts.
_REAL: dict[str, Any] = {"max_context": 8192, "max_running": 256}
_TINY: dict[str, Any] = {"max_context": 64, "max_running": 2, "kv_memory": 1e6}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The published configurations of two models, and their replacement in a smoke run.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
}
SMOKE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def shape_of(machine: Machine, name: str) -> tuple[str, dict[str, Any]]:
    """The family and the configuration of a name on this machine."""
    return ("llama", SMOKE) if machine.smoke else SHAPES[name]


def random_module(model_type: str, dtype: torch.dtype, device: torch.device, **config: Any) -> Any:
    """transformers' own model of that configuration, the same weights for the same arguments."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config), dtype=dtype).eval()
    module.requires_grad_(False)
    return module


def sure_module(machine: Machine, name: str) -> Any:
    """A model of ``SHAPES`` as sure of its next token as a trained one, so that sampling is realistic."""
    model_type, config = shape_of(machine, name)
    module = random_module(model_type, machine.dtype, machine.device, **config)
    head = module.get_output_embeddings().weight
    spread = float(head[:1024].float().std()) * head.shape[1] ** 0.5
    module.get_decoder().norm.weight.mul_(_SURE / spread)
    return module


def lively_module(model_type: str, dtype: torch.dtype, device: torch.device, **config: Any) -> Any:
    """Like ``random_module``, with scores large enough for windows, caps and sinks of tiny models to matter."""
    module = random_module(model_type, dtype, device, **config)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif "embed" not in name:
            parameter.mul_(6.0)
    return module


def loaded(module: Any) -> LoadedModel:
    """The module as the engine loads it, its attention switched to the paged one. It computes nothing else then: keys
    and values may stay latents, for one."""
    attention_hook.register()
    probed = keep_latents(partial(probe, module, module.config.get_text_config()))
    max_context = int(module.config.max_position_embeddings)
    return LoadedModel(module, probed.grouped(max_context), max_context, "", ())


@contextmanager
def as_published(module: Any, attention: str) -> Iterator[None]:
    """The module by transformers' own code with that attention, for the block; not one that was ``loaded``."""
    before = module.config._attn_implementation
    for code in {sys.modules[type(part).__module__] for part in module.modules()}:
        rotate = vars(code).get("apply_rotary_pos_emb")
        # A runner of the same family installs our version for all models of that code.
        if (original := getattr(rotate, "castor_original", None)) is not None:
            vars(code)["apply_rotary_pos_emb"] = original
    set_attention(module, attention)
    try:
        yield
    finally:
        set_attention(module, before)


@torch.inference_mode()
def plain_logits(module: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, [tokens, vocabulary], by transformers' own code; of a module that was not ``loaded``."""
    with as_published(module, "eager"):
        ids = torch.tensor([tokens], device=module.device)
        logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def make_runner(machine: Machine, model: LoadedModel, max_context: int, **config: Any) -> ModelRunner:
    """The engine's own runner over ``model``. ``config`` are fields of ``EngineConfig``.

    Where its kernels do not run, the engine falls back; a check must call ``problem_of`` to find out.
    """
    given = EngineConfig(path="", device=str(machine.device), max_context=max_context, block_size=BLOCK_SIZE, **config)
    model = LoadedModel(model.module, model.probe, min(model.max_context, max_context), "", ())
    platform = CudaPlatform(machine.device, attention=machine.attention, record=machine.record)
    runner = start_model(lambda: model, given, (), lambda *_: None, platform)
    assert isinstance(runner, ModelRunner)
    return runner


def make_sampler(machine: Machine, runner: ModelRunner) -> DeviceSampler:
    """The engine's own sampler of a runner of ``make_runner``."""
    platform = CudaPlatform(machine.device, record=machine.record)
    sampler = platform.sampler(runner, EngineConfig(path="", device=str(machine.device)))
    assert isinstance(sampler, DeviceSampler)
    return sampler


def problem_of(machine: Machine, runner: ModelRunner) -> str:
    """What is wrong with a runner's attention, if it is not the machine's own; else ""."""
    fell_back = isinstance(runner.attention, ReferenceAttention) and machine.attention is not ReferenceAttention
    return "the Triton kernels do not run here" if fell_back else ""


class Pages:
    """Hands out the blocks of a runner's cache, in all layer groups those of all tokens."""

    def __init__(self, runner: ModelRunner) -> None:
        self._groups = runner.info.groups
        self._free = list(range(min(group.num_blocks for group in self._groups)))

    def holds(self, sequences: int, tokens: int) -> bool:
        """Whether ``sequences`` sequences of ``tokens`` tokens fit."""
        return sequences * -(-tokens // BLOCK_SIZE) <= len(self._free)

    def sequence(self, tokens: list[int], room: int) -> Sequence:
        """A sequence with blocks for ``room`` tokens."""
        blocks = array("i", [self._free.pop() for _ in range(-(-room // BLOCK_SIZE))])
        others = tuple(blocks[:] for _ in self._groups[1:])
        return Sequence(Request("check", (tokens[0],), GREEDY), 0, list(tokens), blocks=blocks, other_tables=others)


def random_tokens(seed: int, count: int, vocab_size: int) -> list[int]:
    """A text that shares nothing with that of another seed."""
    source = random.Random(seed)
    return [source.randrange(3, vocab_size) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Made:
    """A runner with its sampler, and the sizes of its model before weights were fused.

    Bytes are the minimum that a token reads.
    """

    name: str
    runner: ModelRunner
    sampler: DeviceSampler
    parameters: int
    weight_bytes: int
    layer_parameters: int
    kv_bytes: int


class Models:
    """Makes the runners of the speed parts; keeps one, because the next part may use the same."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._made: Made | None = None

    def get(self, name: str) -> Made:
        """The runner of a model of ``SHAPES``. Raises what the engine raises."""
        if self._made is None or self._made.name != name:
            self.forget()
            self._made = self._make(name)
        return self._made

    def forget(self) -> None:
        """Free its memory."""
        self._made = None
        self._machine.forget()

    def _make(self, name: str) -> Made:
        module = sure_module(self._machine, name)
        model = loaded(module)
        total = sum(parameter.numel() for parameter in module.parameters())
        embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        ends = {id(weight): weight.numel() for weight in (embedding, head)}
        # A token reads one row of the embedding, unless it is the head too.
        read = total if head is embedding else total - embedding.numel()
        kv_numbers = sum(shape.numbers for shape in model.probe.shapes)
        runner = make_runner(self._machine, model, **(_TINY if self._machine.smoke else _REAL))
        size = self._machine.dtype.itemsize
        sampler = make_sampler(self._machine, runner)
        return Made(name, runner, sampler, total, read * size, total - sum(ends.values()), kv_numbers * size)
