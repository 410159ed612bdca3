"""Are the kernels and the recordings correct? Compared with torch and transformers, on the device itself."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from engine.runner.torch_runner import ModelRunner
from engine.scheduling.sequence import ScheduledChunk
from gpu_checks.check import Check
from gpu_checks.machine import Machine
from gpu_checks.models import (
    Pages,
    as_published,
    lively_module,
    loaded,
    make_runner,
    plain_logits,
    problem_of,
    random_module,
    random_tokens,
    shape_of,
    sure_module,
)
from gpu_checks.parts.attention import PART, compare_attention, difference, plain_products
from gpu_checks.parts.recurrent import compare_flash, compare_recurrent
from gpu_checks.report import reason_of

# Makes transformers' own model, the same weights at each call.
Build = Callable[[], Any]

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
    "deepseek_v2": {
        "first_k_dense_replace": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
    },
}
# For a smoke run: one layer, so that the interpreter is done in seconds.
SMOKE_FAMILIES = {
    "gemma2": {**FAMILIES["gemma2"], "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "deepseek_v2": {**FAMILIES["deepseek_v2"], "num_hidden_layers": 1},
}
# Families whose decodes can be recorded in bfloat16 only, and only where torch has a grouped product of that type.
MIXTURES = ("gpt_oss", "qwen3_moe")
LENGTHS = (37, 5, 19)
SMOKE_LENGTHS = (9, 5)
MANY_LENGTHS = tuple(1 + 7 * i % 55 for i in range(71))
NEW_TOKENS = 3
# A model of bfloat16 is 0.017 of the largest logit away from itself in float32 by rounding alone (Qwen3-0.6B, 40
# tokens, on a CPU). Where the best two are closer than two such models can be apart, either may win.
BFLOAT16_TIE = 0.05
FLOAT32_TIE = 1e-4


def run(check: Check) -> None:
    """Check attention, families, mixtures, a whole small model, and the tokens that it writes."""
    machine = check.machine
    with plain_products():
        compare_attention(check)
        compare_recurrent(check)
        for family, extra in (SMOKE_FAMILIES if machine.smoke else FAMILIES).items():
            build = partial(lively_module, family, torch.float32, machine.device, **{**SMALL, **extra})
            lengths = SMOKE_LENGTHS if machine.smoke else LENGTHS
            compare_model(check, family, build, 1e-3, lengths)
        if not machine.smoke:
            _compare_models_of_bfloat16(check)
        compare_flash(check)
    name = "Qwen3-0.6B, greedy tokens"
    if check.has_time(PART, name, 8.0):
        try:
            _compare_tokens(check, name)
        except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
            check.report.compared(PART, name, math.inf, 0.0, reason_of(error))


def _compare_models_of_bfloat16(check: Check) -> None:
    machine = check.machine
    family, config = shape_of(machine, "Qwen3-0.6B")
    build = partial(random_module, family, torch.bfloat16, machine.device, **config)
    compare_model(check, "Qwen3-0.6B, bfloat16", build, 1e-1, LENGTHS)
    name = f"Qwen3-0.6B, {len(MANY_LENGTHS)} sequences"
    compare_model(check, name, build, 1e-1, MANY_LENGTHS, only_recorded=True)
    for family in MIXTURES:
        # Not lively: a token that rounding sends to another expert should make no large difference.
        build = partial(random_module, family, torch.bfloat16, machine.device, **{**SMALL, **FAMILIES[family]})
        compare_model(check, f"{family}, bfloat16", build, 1e-1, LENGTHS, only_recorded=True)


def compare_model(
    check: Check, name: str, build: Build, allowed: float, lengths: tuple[int, ...], only_recorded: bool = False
) -> None:
    """A whole model: ours against transformers' own forward, and recorded steps against computed ones."""
    if not check.has_time(PART, name, 4.0):
        return
    machine, report, source = check.machine, check.report, random.Random(1)
    texts = [[source.randrange(3, 256) for _ in range(length + NEW_TOKENS)] for length in lengths]
    try:
        computed, runner = _logits_of(machine, build, texts, cuda_graphs=False)
        problem = problem_of(machine, runner)
        del runner
        if not only_recorded:
            machine.forget()
            expected = _expected(build(), texts)
            worst = math.inf if problem else difference(computed, expected)
            report.compared(PART, f"{name}, our forward", worst, allowed, problem)
        replayed, runner = _logits_of(machine, build, texts, cuda_graphs=True)
        note = problem or _missing(runner)
        report.compared(PART, f"{name}, recorded steps", difference(replayed, computed), allowed, note)
    except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
        report.compared(PART, name, math.inf, allowed, reason_of(error))
        machine.wait()  # raises where the device is lost


def _logits_of(
    machine: Machine, build: Build, texts: list[list[int]], cuda_graphs: bool
) -> tuple[torch.Tensor, ModelRunner]:
    machine.forget()
    running = len(texts) + 1  # so that recorded steps are padded
    memory = 1.6e7 * running
    # No recorded step has more tokens than the context, and each size takes time to record.
    context = 32 if machine.smoke else 1024 if len(texts) > 8 else 256
    runner = make_runner(
        machine, loaded(build()), context, max_running=running, kv_memory=memory, cuda_graphs=cuda_graphs
    )
    return _generated(runner, texts), runner


def _expected(module: Any, texts: list[list[int]]) -> torch.Tensor:
    """What ``_generated`` should find, by transformers' own code."""
    plain = [plain_logits(module, text) for text in texts]
    last = -1 - NEW_TOKENS  # the last token of the prompt
    return torch.stack([logits[last + step] for step in range(NEW_TOKENS + 1) for logits in plain])


def _missing(runner: ModelRunner) -> str:
    """What of a model's steps is not recorded."""
    kinds = {shape.only_decodes for shape in runner.recorded_shapes}
    return "" if len(kinds) == 2 else "no step with prefill is recorded" if kinds else "no step is recorded"


def _generated(runner: ModelRunner, texts: list[list[int]]) -> torch.Tensor:
    """Logits after the prompts of all texts, then after each further token, [rows, vocabulary].

    Every other prompt is computed in two chunks; beside the second, those that were computed in one decode already.
    """
    pages = Pages(runner)
    sequences = [pages.sequence(text, len(text)) for text in texts]
    ends = []
    for number, text in enumerate(texts):
        length = len(text) - NEW_TOKENS
        part = 0 if number % 2 else int(0.4 * length)
        ends.append([0, *([part] if part else []), *range(length, len(text) + 1)])
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(1, max(map(len, ends))):
        chunks, rows = [], []
        for sequence, text, own, logits in zip(sequences, texts, ends, found, strict=True):
            if step < len(own):
                # Tokens of the prompt are known from the beginning, so that its first part does not sample.
                sequence.tokens = text[: max(own[step], len(text) - NEW_TOKENS)]
                chunks.append(ScheduledChunk(sequence, own[step - 1], own[step] - own[step - 1]))
                rows += [logits] if chunks[-1].samples else []
        for logits, row in zip(rows, runner.forward(chunks), strict=True):
            logits.append(row.clone())
    return torch.stack([logits[step] for step in range(NEW_TOKENS + 1) for logits in found])


def _compare_tokens(check: Check, name: str) -> None:
    """A recorded model reads what ``generate`` wrote: does it choose the same tokens, except where rounding may
    decide?"""
    machine = check.machine
    count, length, new = (2, 6, 3) if machine.smoke else (4, 24, 32)
    module = sure_module(machine, "Qwen3-0.6B")
    prompts = [random_tokens(number, length, module.config.vocab_size) for number in range(count)]
    written, logits = _written(module, prompts, new)
    memory = 1e6 if machine.smoke else 2e9
    runner = make_runner(machine, loaded(module), length + new, max_running=count, kv_memory=memory)
    if problem := problem_of(machine, runner):
        check.report.compared(PART, name, math.inf, 0.0, problem)
        return
    pages = Pages(runner)
    sequences = [pages.sequence(prompt, length + new) for prompt in prompts]
    tie = FLOAT32_TIE if machine.smoke else BFLOAT16_TIE
    agreed = decided = wrong = 0
    for step in range(new):
        known = length + step
        for sequence, prompt, answer in zip(sequences, prompts, written, strict=True):
            sequence.tokens = prompt + answer[:step]
        chunks = [ScheduledChunk(sequence, known - 1 if step else 0, 1 if step else length) for sequence in sequences]
        chosen = runner.forward(chunks).argmax(dim=-1).tolist()
        for row, token in enumerate(chosen):
            expected = logits[step][row].float()
            first, second = expected.topk(2).values.tolist()
            clear = first - second > tie * float(expected.abs().max())
            agrees = token == written[row][step]
            agreed, decided, wrong = agreed + agrees, decided + clear, wrong + (clear and not agrees)
    note = f"{agreed} of {count * new} tokens as generate has them; {decided} are clear, of which {wrong} differ"
    if missing := _missing(runner):
        note += f"; {missing}"
    check.report.compared(PART, name, float(wrong), 0.0, note)


@torch.inference_mode()
def _written(module: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], tuple[torch.Tensor, ...]]:
    """What transformers' ``generate`` writes after each prompt, and its logits at each token, [prompts, vocabulary]."""
    ids = torch.tensor(prompts, device=module.device)
    # No end token: all answers are of one length.
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with as_published(module, "sdpa"):
        output = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output.sequences[:, ids.shape[1] :].tolist(), output.logits
