"""Models with LongRoPE at tiny sizes: logits on both sides of the original context equal a plain float32 forward."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.digests import Told, run_to_end
from support.paged import BLOCK_SIZE, PagedModel, lively_model_folder, make_sequence, plain_logits, plain_model
from support.recording import GraphGather, record
from support.tiny import SMALL, save_tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import load_tokenizer
from engine.cache import layout
from engine.cache.block_pool import extend_keys
from engine.cache.state_tensors import slot_bytes
from engine.core.core import Core
from engine.model.loader import load_model
from engine.platforms.base import Platform
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.platforms.recipe import start_model
from engine.rope.long_rope import LongRope
from engine.runner.torch_runner import ModelRunner
from engine.scheduling import sequence_memory
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk
from engine.scheduling.sequence_memory import SequenceMemory

pytestmark = pytest.mark.reference

TOLERANCE, MOE_TOLERANCE = 1e-4, 5e-4
ORIGINAL = 32


def _rope(num_frequencies: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + 0.05 * i for i in range(num_frequencies)],
        "long_factor": [2 + 0.7 * i for i in range(num_frequencies)],
        "original_max_position_embeddings": ORIGINAL,
        **more,
    }


def _phi3(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": _rope(8, **rope), "original_max_position_embeddings": ORIGINAL}


UNCHANGED = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": _phi3(),
    "phimoe": {"rope_parameters": _rope(8, short_mscale=1.1, long_mscale=1.4), "num_local_experts": 4},
    # Keeps latents.
    "minicpm3": {
        "rope_parameters": _rope(4),
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    # Layers with a window are rotated in one way.
    "gemma3_text": {
        "rope_parameters": {"full_attention": _rope(8), "sliding_attention": UNCHANGED},
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # Carries states, which are computed again too.
    "falcon_h1": {
        "rope_parameters": _rope(8),
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
    },
    # Counts positions along several axes.
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _rope(8, mrope_section=[2, 3, 3]),
            "sliding_attention": {**UNCHANGED, "mrope_section": [2, 3, 3]},
        },
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
LIVELINESS = {"falcon_h1": 3.0, "minicpm3": 3.0}
"""The larger weights are, the more rounding is amplified: with these at 6, more than the tolerance in long texts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("longrope")


def _folder(folders: Path, family: str, num_hidden_layers: int = 4) -> Path:
    folder = folders / f"{family}-{num_hidden_layers}"
    if not folder.exists():
        config = {**FAMILIES[family], "num_hidden_layers": num_hidden_layers}
        lively_model_folder(folder, family, LIVELINESS.get(family, 6.0), **config)
    return folder


def _tolerance(family: str) -> float:
    return MOE_TOLERANCE if family == "phimoe" else TOLERANCE


def _texts() -> list[list[int]]:
    rnd = random.Random(1)
    return [[rnd.randrange(3, 256) for _ in range(n)] for n in (20, ORIGINAL, ORIGINAL + 1, 75)]


def _worst(found: dict[int, torch.Tensor], expected: torch.Tensor) -> float:
    assert found, "nothing was compared"
    return max((row - expected[index]).abs().max().item() for index, row in found.items())


class Both(NamedTuple):
    """A model on its way through pages, and the logits of a plain forward for ``_texts``."""

    paged: PagedModel
    expected: list[torch.Tensor]


@pytest.fixture(scope="module")
def both(folders: Path) -> Callable[[str], Both]:
    @cache
    def make(family: str) -> Both:
        folder = _folder(folders, family)
        plain = plain_model(folder)
        return Both(PagedModel(folder, num_blocks=1024), [plain_logits(plain, text) for text in _texts()])

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixture_of_short_and_long_texts_equals_a_plain_forward(family: str, both: Callable[[str], Both]) -> None:
    paged, expected = both(family)
    assert paged.original == ORIGINAL
    for chunk in (2, 9, 100):
        for found, logits in zip(paged.run(_texts(), chunk), expected, strict=True):
            assert _worst(found, logits) < _tolerance(family)
    for text, logits in zip(_texts(), expected, strict=True):
        assert _worst(paged.run([text])[0], logits) < _tolerance(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_sees_the_other_factors(
    family: str, both: Callable[[str], Both], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all tokens of a step are rotated alike, only texts of that kind are right."""
    paged, expected = both(family)
    rotating = LongRope.rotating
    for all_are_long in (False, True):
        monkeypatch.setattr(
            LongRope, "rotating", lambda rope, flags, every=all_are_long: rotating(rope, torch.full_like(flags, every))
        )
        for text, found, logits in zip(_texts(), paged.run(_texts()), expected, strict=True):
            worst = _worst(found, logits)
            assert worst < _tolerance(family) if (len(text) > ORIGINAL) == all_are_long else worst > 0.01


def test_a_step_that_does_not_say_which_texts_are_long_is_refused(both: Callable[[str], Both]) -> None:
    paged, _ = both("phi3")
    chunk = ScheduledChunk(make_sequence([5, 6, 7], paged.take_blocks(3)), 0, 3)
    assert isinstance(paged.runner, ModelRunner)
    with pytest.raises(ValueError, match="the step has no long_tokens, by which this model is rotated"):
        paged.runner.compute(flatten([chunk], BLOCK_SIZE))


# --- The whole engine ------------------------------------------------------------------------------------------------


def _core(folder: Path, *, ahead: bool, num_blocks: int) -> Core:
    """A core for four sequences at once, which share ``num_blocks``; ``ahead`` as on a GPU, with recorded steps."""
    config = EngineConfig(str(folder), "float32", "cpu", block_size=4, state_stride=16, max_running=4, max_context=96)
    platform: Platform = CpuPlatform()
    if ahead:
        platform = CudaPlatform(torch.device("cpu"), attention=GraphGather, record=record)
    loaded = load_model(config, lambda stage, done: None)
    per_block = layout.block_bytes([layer.shape for layer in loaded.probe.layers], 4, torch.float32)
    per_slot, scratch = slot_bytes(loaded.probe.states), platform.scratch_blocks
    for budget in count(per_block * num_blocks, per_block):
        plan = layout.plan_caches(
            budget, [layout.GroupDemand(per_block)], 4, config.max_context or 0, 4, bytes_per_slot=per_slot
        )
        if plan.max_running == 4 and plan.groups[0].num_blocks >= num_blocks:
            break
    held = budget + scratch * (per_block + per_slot)
    platform.cache_bytes = lambda kv_memory, reserved: held  # type: ignore[method-assign]
    runner = start_model(lambda: loaded, config, (), lambda stage, done: None, platform)
    assert isinstance(runner, ModelRunner)
    assert bool(runner.recorded_shapes) == ahead
    assert runner.info.original_context == ORIGINAL
    sampler = platform.sampler(runner, config)
    timer = map(float, count()).__next__  # so that chunks, and who is preempted, are the same in every run
    return Core(runner, sampler, load_tokenizer(folder), config, ahead=ahead, timer=timer)


def _requests() -> list[Request]:
    """Prompts before, at and after the original context that share beginnings, with answers that cross it."""
    *_, text = _texts()
    lengths = (ORIGINAL - 12, ORIGINAL - 12, ORIGINAL - 3, ORIGINAL, ORIGINAL + 1, ORIGINAL + 20, 6)
    return [
        Request(
            f"r{number}",
            tuple(text[:length]),
            SamplingParams(max_tokens=18, temperature=0.0, logprobs=0, stop_ids=()),
            candidates=3 if number == 1 else 1,
        )
        for number, length in enumerate(lengths)
    ]


def _apart(request: Request, told: Told, plain: Any) -> float:
    """How far log-probabilities are from those of a plain forward over the tokens known by then, and how far each
    chosen token is from being the likeliest."""
    assert len(told.tokens) == request.candidates
    worst = 0.0
    for candidate, tokens in told.tokens.items():
        text = [*request.prompt, *tokens]
        logits = torch.cat([plain_logits(plain, text[:ORIGINAL]), plain_logits(plain, text)[ORIGINAL:]])
        rows = logits.log_softmax(-1)[len(request.prompt) - 1 :]
        for row, token, found in zip(rows, tokens, told.logprobs[candidate], strict=False):
            worst = max(worst, abs(found.chosen - float(row[token])), float(row.max() - row[token]))
    return worst


@pytest.mark.parametrize(
    ("family", "ahead"), [("phi3", False), ("phi3", True), ("phimoe", True), ("minicpm3", False), ("falcon_h1", False)]
)
def test_the_core_answers_with_the_numbers_of_a_plain_forward(
    family: str, ahead: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together on a cache that is too small for them, with one that is cancelled; then some of them again, cached."""
    monkeypatch.setattr(layout, "SNAPSHOTS_SHARE", 0.4)
    folder, requests = _folder(folders, family, num_hidden_layers=2), _requests()
    if family == "falcon_h1":  # its operators take their time
        requests = requests[:4]
    plain = plain_model(folder)
    with closing(_core(folder, ahead=ahead, num_blocks=26)) as core:
        told = run_to_end(core, *requests, cancelled=["r6"])
        assert core.stats().preemptions
        for request in requests:
            if not told[request.id].done.error:
                assert _apart(request, told[request.id], plain) < 10 * _tolerance(family)
        for request in requests[1], requests[-2]:
            run_to_end(core, request)
            again = run_to_end(core, request)[request.id]
            assert again.done.cached_tokens or core.info.state_bytes, "few snapshots fit"
            assert again.tokens == told[request.id].tokens
            assert _apart(request, again, plain) < 10 * _tolerance(family)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("lost", ["salt", "again"])
def test_the_comparison_sees_what_a_core_loses(
    lost: str, ahead: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One salt for short and long texts; or a text that goes on with the keys that it has."""
    if lost == "salt":
        monkeypatch.setattr(sequence_memory, "extend_keys", lambda *given, is_long: extend_keys(*given))
    else:
        monkeypatch.setattr(SequenceMemory, "has_outgrown", lambda memory, sequence: False)
    folder, (*_, longer, _) = _folder(folders, "phi3", num_hidden_layers=2), _requests()
    plain = plain_model(folder)
    first, second = _requests()[0], longer
    with closing(_core(folder, ahead=ahead, num_blocks=90)) as core:
        apart = [_apart(request, run_to_end(core, request)[request.id], plain) for request in (first, second)]
    assert max(apart) > 1000 * TOLERANCE


def test_the_text_part_of_a_composite_is_rotated_so(tmp_path: Path) -> None:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "phi3", **SMALL, **_phi3()}
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name:
                    parameter.mul_(6)
    model.save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    paged, texts = PagedModel(tmp_path), _texts()
    assert paged.original == ORIGINAL
    model.eval().set_attn_implementation("eager")
    for found, tokens in zip(paged.run(texts), texts, strict=True):
        assert _worst(found, plain_logits(model, tokens)) < TOLERANCE
