"""The same weights in transformers' own ``generate`` and ``generate_batch``, with torch's attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.models import as_published, random_tokens, sure_module
from gpu_checks.report import reason_of

PART = "peers"
NAME = "Llama-3.1-8B"
# Sequences, tokens of prompt and of answer.
LOADS = ((1, 1024, 48), (8, 1024, 48))
TINY = ((1, 5, 2), (2, 5, 2))
# Tokens of a page of its cache, the default, and the maximum of a step.
_PAGE = 256
_MOST_TOKENS = 4096


def run(check: Check) -> None:
    """Measure each way that runs here; one that does not gets a line."""
    if not check.has_time(PART, NAME, 15.0):
        return
    check.models.forget()
    module = sure_module(check.machine, NAME)
    with as_published(module, "sdpa"):
        for sequences, prompt, answer in TINY if check.machine.smoke else LOADS:
            prompts = [random_tokens(7000 + n, prompt, module.config.vocab_size) for n in range(sequences)]
            _measure(
                check, f"generate, {sequences} × {prompt}/{answer} tokens", prompts, answer, partial(_generate, module)
            )
        try:
            name = f"generate_batch, {sequences} × {prompt}/{answer} tokens"
            _measure(check, name, prompts, answer, partial(_generate_batch, module))
        finally:
            module.destroy_cached_continuous_batching_manager()
    del module
    check.machine.forget()


Generate = Callable[[list[list[int]], int], int]


def _measure(check: Check, name: str, prompts: list[list[int]], answer: int, generate: Generate) -> None:
    """Tokens of answers a second, prompts included, once warm."""
    title = f"{NAME}, {name}"
    if not check.has_time(PART, title, 8.0):
        return
    try:
        generate(prompts, answer)
        prompt_seconds = check.machine.seconds(partial(generate, prompts, 1))
        made: list[int] = []
        seconds = check.machine.seconds(lambda: made.append(generate(prompts, answer)))
    except Exception as error:  # noqa: BLE001 - others' code may raise anything; its failure is the finding
        check.report.skipped(PART, title, reason_of(error))
        return
    if made[0] < len(prompts) * answer:
        check.report.skipped(PART, title, f"only {made[0]} of {len(prompts) * answer} tokens came")
        return
    pace = len(prompts) * (answer - 1) / max(seconds - prompt_seconds, 1e-9)
    ours = check.report.value("decode", f"{len(prompts)} sequences, greedy")
    beside = f"; ours decodes {ours / pace:.2f} × as fast" if ours else ""
    if ours and len(prompts) == 8:
        goal = goals.GENERATE_BATCH if "generate_batch" in name else goals.GENERATE
        check.report.share(goal, ours / pace)
    check.report.number(PART, title, made[0] / seconds, "tok/s", f"decoding {pace:,.0f} tok/s{beside}")


def _config(answer: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=answer, do_sample=False, pad_token_id=0)


@torch.inference_mode()
def _generate(module: Any, prompts: list[list[int]], answer: int) -> int:
    ids = torch.tensor(prompts, device=module.device)
    output = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_config(answer))
    return int(output[:, ids.shape[1] :].numel())


@torch.no_grad()  # its thread writes to tensors made in this one, which inference mode would forbid
def _generate_batch(module: Any, prompts: list[list[int]], answer: int) -> int:
    config = _config(answer)
    config.eos_token_id = -1  # as it sets it itself, with a warning
    pages = len(prompts) * (-(-(len(prompts[0]) + answer) // _PAGE) + 1)
    batching = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=_MOST_TOKENS, allow_block_sharing=False)
    results = module.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=batching,
        max_new_tokens=answer,
        persistent_manager=True,
    )
    return sum(len(result.generated_tokens) for result in results.values())
