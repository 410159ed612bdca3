"""Do the kernels and the recordings compute what they should? Against torch and transformers, on the device itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from engine.attention.base import AttentionOptions
from engine.attention.reference import ReferenceAttention
from engine.batch import Sequence, Work
from engine.kv import KVCache, KVShape
from engine.model import LoadedModel
from engine.runner import ModelRunner
from engine.types import Request
from gpu_checks.setup import GREEDY, Machine, Pages, make_runner, plain_logits, random_model, uses
from gpu_checks.speed import SHAPES


class Finding(NamedTuple):
    """One comparison: the worst difference as a share of the largest number, and what is allowed."""

    name: str
    worst: float
    allowed: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.worst <= self.allowed


ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Query heads, cache, window, cap, sinks.
LAYERS: dict[str, tuple[int, KVShape, int | None, float | None, bool]] = {
    "llama": (32, KVShape(8, 128, 128), None, None, False),
    "one head each": (8, KVShape(8, 64, 64), None, None, False),
    "gemma2": (16, KVShape(8, 256, 256), 300, 50.0, False),
    "gpt-oss": (64, KVShape(8, 64, 64), 128, None, True),
    "head size 512": (8, KVShape(1, 512, 512), None, None, False),
    "no power of two": (6, KVShape(2, 80, 80), 33, None, True),
    "keys unlike values": (16, KVShape(16, 192, 128), None, None, False),
}
# Tokens before and tokens now.
STEPS = {
    "decodes": ((0, 1), (15, 1), (16, 1), (700, 1), (3000, 1)),
    "one long decode": ((5000, 1),),
    "chunks": ((0, 100), (100, 65), (1000, 200)),
    "mixed": ((0, 70), (400, 1), (2, 1), (130, 35), (0, 1)),
    # So many that a device of 132 processors is busy with one program for each, also with one head of keys: no splits.
    "many decodes": tuple((7 * i % 400, 1) for i in range(300)),
}
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {**HYBRID, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**HYBRID, "query_pre_attn_scalar": 5},
    "phi3": {},
    "gpt_oss": {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "granite": {"attention_multiplier": 0.4},
}
# Families whose decodes can be recorded in bfloat16 alone, and only where torch has a grouped product of that type.
MIXTURES = ("gpt_oss", "qwen3_moe")
LENGTHS = (37, 5, 19)
MANY_LENGTHS = tuple(1 + 7 * i % 55 for i in range(71))
NEW_TOKENS = 3


def findings(machine: Machine) -> Iterator[Finding]:
    """Every comparison, as it is made."""
    # The reference is torch's plain formula: its faster kernels may round float32 to less.
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    layers = ["no power of two"] if machine.smoke else list(LAYERS)
    for name in layers:
        for dtype in [torch.float32] if machine.smoke else list(ALLOWED):
            yield _attention(machine, name, dtype)
    for family in ["gemma2"] if machine.smoke else FAMILIES:
        build = partial(random_model, family, torch.float32, machine.device, True, **{**SMALL, **FAMILIES[family]})
        yield from _model(machine, family, build, 1e-3)
    if not machine.smoke:
        yield from _models_of_bfloat16(machine)


def _models_of_bfloat16(machine: Machine) -> Iterator[Finding]:
    for family in MIXTURES:
        # Not lively: a token that rounding sends to another expert shall make no large difference.
        build = partial(random_model, family, torch.bfloat16, machine.device, False, **{**SMALL, **FAMILIES[family]})
        yield from _model(machine, f"{family}, bfloat16", build, 1e-1, only_recorded=True)
    family, config = SHAPES["Qwen3-0.6B"]
    build = partial(random_model, family, torch.bfloat16, machine.device, False, **config)
    # Rounding alone keeps such a model 0.017 away from itself in float32 (40 tokens, 28 layers, on a CPU).
    yield from _model(machine, "Qwen3-0.6B, bfloat16", build, 1e-1)
    name = f"Qwen3-0.6B, {len(MANY_LENGTHS)} sequences"
    yield from _model(machine, name, build, 1e-1, MANY_LENGTHS, only_recorded=True)


def _attention(machine: Machine, name: str, dtype: torch.dtype) -> Finding:
    """One layer, over all steps, against the reference in float32 on the same numbers."""
    heads, shape, window, softcap, has_sinks = LAYERS[name]
    sinks = torch.linspace(-1, 3, heads, device=machine.device, dtype=dtype) if has_sinks else None
    options = AttentionOptions(shape.key_size**-0.5, window, softcap, sinks)
    title = f"attention, {name}, {str(dtype).removeprefix('torch.')}"
    worst = 0.0
    for step in ["mixed"] if machine.smoke else STEPS:
        try:
            worst = max(worst, _step(machine, heads, shape, options, dtype, STEPS[step]))
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
            return Finding(title, math.inf, ALLOWED[dtype], f"{step}: {_reason(error)}")
    return Finding(title, worst, ALLOWED[dtype])


@torch.inference_mode()
def _step(
    machine: Machine,
    heads: int,
    shape: KVShape,
    options: AttentionOptions,
    dtype: torch.dtype,
    step: tuple[tuple[int, int], ...],
) -> float:
    torch.manual_seed(0)
    works = _laid_out(step)
    num_blocks = 1 + sum(len(work.sequence.blocks) for work in works)
    device = machine.device
    ours = KVCache([shape], num_blocks, 16, dtype=dtype, device=device)
    exact = KVCache([shape], num_blocks, 16, dtype=torch.float32, device=device)
    for mine, theirs in ((ours.keys[0], exact.keys[0]), (ours.values[0], exact.values[0])):
        mine.copy_(torch.randn(mine.shape, device=device))
        theirs.copy_(mine)
    tokens = sum(work.num_tokens for work in works)
    keys = torch.randn(shape.heads, tokens, shape.key_size, device=device).to(dtype).transpose(0, 1)
    values = torch.randn(tokens, shape.heads, shape.value_size, device=device).to(dtype)
    keys[0, 0, 0], values[-1, -1, -1] = math.nan, -math.inf
    query = torch.randn(heads, tokens, shape.key_size, device=device).to(dtype).transpose(0, 1)
    backend, reference = machine.attention(ours, {options.sliding_window}), _reference(exact, options)
    exact_sinks = None if options.sinks is None else options.sinks.float()
    backend.prepare(works)
    reference.prepare(works)
    backend.write_kv(0, keys, values)
    reference.write_kv(0, keys.float(), values.float())
    found = backend.attend(0, query, options).float()
    expected = reference.attend(0, query.float(), options._replace(sinks=exact_sinks))
    return max(
        _difference(found, expected),
        _difference(ours.keys[0].float(), exact.keys[0]),
        _difference(ours.values[0].float(), exact.values[0]),
    )


def _reference(cache: KVCache, options: AttentionOptions) -> ReferenceAttention:
    return ReferenceAttention(cache, {options.sliding_window})


def _laid_out(step: tuple[tuple[int, int], ...]) -> list[Work]:
    """Works whose blocks are scattered over a pool that is one block larger than they need."""
    needed = [-(-(past + count) // 16) for past, count in step]
    free = random.Random(0).sample(range(sum(needed) + 1), sum(needed) + 1)
    works = []
    for (past, count), blocks in zip(step, needed, strict=True):
        owned = [free.pop() for _ in range(blocks)]
        works.append(Work(Sequence(Request("check", (1,), GREEDY), 0, [1] * (past + count), blocks=owned), past, count))
    return works


def _model(
    machine: Machine,
    name: str,
    build: Callable[[], LoadedModel],
    allowed: float,
    lengths: tuple[int, ...] = LENGTHS,
    only_recorded: bool = False,
) -> Iterator[Finding]:
    """A whole model: ours against transformers' own forward, and recorded decodes against computed ones."""
    try:
        yield from _comparisons(machine, name, build, allowed, lengths, only_recorded)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
        yield Finding(name, math.inf, allowed, _reason(error))


def _comparisons(
    machine: Machine,
    name: str,
    build: Callable[[], LoadedModel],
    allowed: float,
    lengths: tuple[int, ...],
    only_recorded: bool,
) -> Iterator[Finding]:
    running = len(lengths) + 1  # so that recorded steps are padded
    texts = _texts(lengths)

    def logits(cuda_graphs: bool) -> tuple[torch.Tensor, ModelRunner]:
        machine.forget()
        memory = 1.6e7 * running
        runner = make_runner(machine, build(), 64, max_running=running, kv_memory=memory, cuda_graphs=cuda_graphs)
        return _generated(runner, texts), runner

    computed, runner = logits(cuda_graphs=False)
    problem = uses(machine, runner)
    del runner
    if not only_recorded:
        machine.forget()
        expected = _expected(build(), texts)
        worst = math.inf if problem else _difference(computed, expected)
        yield Finding(f"{name}, our forward", worst, allowed, problem)
    replayed, runner = logits(cuda_graphs=True)
    note = problem if runner.replays else "its decodes cannot be recorded"
    yield Finding(f"{name}, recorded decodes", _difference(replayed, computed), allowed, note)


def _texts(lengths: tuple[int, ...]) -> list[list[int]]:
    rnd = random.Random(1)
    return [[rnd.randrange(3, 256) for _ in range(length + NEW_TOKENS)] for length in lengths]


def _expected(model: LoadedModel, texts: list[list[int]]) -> torch.Tensor:
    """What ``_generated`` should find, by transformers' own code."""
    plain = [plain_logits(model, text) for text in texts]
    last = -1 - NEW_TOKENS  # the last token of the prompt
    return torch.stack([logits[last + step] for step in range(NEW_TOKENS + 1) for logits in plain])


def _generated(runner: ModelRunner, texts: list[list[int]]) -> torch.Tensor:
    """Logits of a chunked prefill and of decodes of all texts, [rows, vocabulary]."""
    pages = Pages(runner)
    lengths = [len(text) - NEW_TOKENS for text in texts]
    sequences = [pages.sequence(text, len(text)) for text in texts]
    found = []
    for begin, end in ((0, 0.4), (0.4, 1.0)):
        works = []
        for sequence, text, length in zip(sequences, texts, lengths, strict=True):
            sequence.tokens = text[:length]
            start, stop = int(length * begin), int(length * end)
            if start < stop:
                works.append(Work(sequence, start, stop - start))
        found.append(runner.forward(works).clone())
    for step in range(NEW_TOKENS):
        works = []
        for sequence, text, length in zip(sequences, texts, lengths, strict=True):
            sequence.tokens = text[: length + step + 1]
            works.append(Work(sequence, length + step, 1))
        found.append(runner.forward(works).clone())
    return torch.cat(found)


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number; infinite where a number is not one."""
    if found.shape != expected.shape or not found.isfinite().all():
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
