"""Recurrent layers: are our kernels and flash-linear-attention right, and what does a decode step of a layer cost?"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.attention.triton_paged import TritonAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.model import attention_hook
from engine.recurrent import mixer_hook
from engine.recurrent.flash_chunks import FlashChunks
from engine.recurrent.proof import apart_from_own
from engine.recurrent.states import RecurrentStates
from engine.recurrent.triton_states import TritonStates
from engine.scheduling.flat_batch import FlatBatch, GroupBlocks
from gpu_checks.check import Check
from gpu_checks.models import loaded, random_module
from gpu_checks.parts.attention import PART
from gpu_checks.report import reason_of

# The sizes of their makers: Qwen3.5 4B, Granite 4.0 H Tiny, LFM2 1.2B; one layer that recurs and one that attends.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "hidden_size": 2560,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "granitemoehybrid": {
        "hidden_size": 1536,
        "layer_types": ["mamba", "attention"],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
    },
    "lfm2": {
        "hidden_size": 2048,
        "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
_SMALLER = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
SMOKE_FAMILIES = {"qwen3_5_text": {**FAMILIES["qwen3_5_text"], **_SMALLER}}
_BLOCK = 16
_OTHER_SIZES = {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64}


def compare_recurrent(check: Check) -> None:
    """Mixers of each kind against their own forward in torch, by each way that a GPU may take; then their times."""
    machine = check.machine
    for family, sizes in (SMOKE_FAMILIES if machine.smoke else FAMILIES).items():
        for dtype in (torch.float32,) if machine.smoke else (torch.float32, torch.bfloat16):
            name = f"{family}, {str(dtype).removeprefix('torch.')}"
            if check.has_time(PART, name, 3.0):
                model = loaded(random_module(family, dtype, machine.device, **{**_OTHER_SIZES, **sizes}))
                _compare(check, f"{name}, our kernels", model, TritonStates)
                del model
                machine.forget()
        if check.has_time(PART, f"{family}, times", 3.0):
            try:
                _time_layers(check, family, sizes)
            except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
                check.report.failed(PART, f"{family}, times", error)
            machine.forget()


def compare_flash(check: Check) -> None:
    """Chunks by flash-linear-attention, in the type that it is used for, and how long its choice of tilings takes."""
    machine = check.machine
    for family in ("qwen3_5_text", "granitemoehybrid"):
        name = f"{family}, bfloat16, flash-linear-attention"
        if machine.smoke or not check.has_time(PART, name, 3.0):
            continue
        try:
            flash = FlashChunks()
        except ImportError as error:
            check.report.skipped(PART, name, f"not installed: {error}")
            continue
        sizes = {**_OTHER_SIZES, **FAMILIES[family]}
        model = loaded(random_module(family, torch.bfloat16, machine.device, **sizes))
        make = partial(TritonStates, flash=flash)
        first = machine.seconds(partial(_compare, check, name, model, make))
        check.report.number(PART, f"{name}, its first use", first, "s")
        del model
        machine.forget()


def _compare(check: Check, name: str, model: Any, make: Callable[[StateCache], RecurrentStates]) -> None:
    (mixer,) = model.probe.mixers
    try:
        worst, allowed = apart_from_own(mixer, model.module.config.hidden_size, make)
    except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
        check.report.compared(PART, name, math.inf, 0.0, reason_of(error))
        check.machine.wait()  # raises where the device is lost
    else:
        check.report.compared(PART, name, worst, allowed)


@torch.inference_mode()
def _time_layers(check: Check, family: str, sizes: dict[str, Any]) -> None:
    """A decode step of the mixer by torch and by our kernels, and of the attention beside it, recorded."""
    machine = check.machine
    sequences, context = (2, 32) if machine.smoke else (64, 1024)
    model = loaded(random_module(family, machine.dtype, machine.device, **{**_OTHER_SIZES, **sizes}))
    (mixer,), (attending,) = model.probe.mixers, model.probe.layers
    blocks, places = context // _BLOCK, array("i", range(sequences))
    cache = KVCache([attending.shape], sequences * blocks, _BLOCK, dtype=machine.dtype, device=machine.device)
    for kept in (*cache.keys, *cache.values):
        kept.normal_()
    ones, starts = array("i", [1]) * sequences, array("i", [context - 1]) * sequences
    tables, firsts = array("i", range(sequences * blocks)), array("i", range(0, sequences * blocks, blocks))
    groups = (GroupBlocks(tables, firsts, _BLOCK, starts, ones),)
    batch = FlatBatch(array("i", [5]) * sequences, starts, places, ones, array("i"), groups, state_slots=places)
    hidden = machine.random(1, sequences, model.module.config.hidden_size)
    attention = TritonAttention(cache)
    attention.prepare(batch)
    attention_hook.bind(attending.module, attention_hook.PagedLayer(attention, 0))
    rotary = getattr(model.module.model, "rotary_emb", None)
    positions = torch.full((1, sequences), context - 1, device=machine.device)
    turning = None if rotary is None else rotary(hidden, positions)
    for what, make in (("torch", RecurrentStates), ("our kernels", TritonStates)):
        states = make(StateCache(mixer.states, sequences, machine.device))
        states.prepare(batch)
        with mixer_hook.bound(mixer.module, mixer_hook.SlottedMixer(states, 0)):
            seconds = machine.device_seconds(machine.recorded(lambda: mixer.module(hidden)), times=5)
        check.report.number(PART, f"{family}, a decode of {sequences} by {what}", seconds * 1e6, "µs")
    attend = partial(attending.module, hidden, position_embeddings=turning, attention_mask=None)
    seconds = machine.device_seconds(machine.recorded(attend), times=5)
    check.report.number(PART, f"{family}, its attention after {context} tokens", seconds * 1e6, "µs")
