"""Proves at load that the recurrent layers of a model compute in slots and chunks what their own forward does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.api.errors import ModelRefused
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.cache.state_tensors import StateCache
from engine.closeness import difference
from engine.recurrent import mixer_hook
from engine.recurrent.mixer_hook import Mixer
from engine.recurrent.states import RecurrentStates
from engine.scheduling.flat_batch import flatten
from engine.scheduling.sequence import ScheduledChunk, Sequence

_LENGTHS = (71, 70)
_CHUNKS = ((33, 1), (1, 64), (1, 1), (36, 4))
"""Tokens of the two sequences in each step: chunks longer and shorter than those of the operators, and decodes."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""How far apart results may be, as a share of the largest number: sums of many products in another order."""


def require_equal_states(
    mixers: list[Mixer], hidden_size: int, make: Callable[[StateCache], RecurrentStates] | None = None
) -> None:
    """Raises ``ModelRefused`` where the states of a class of mixers do not give the numbers of its own forward.

    One mixer of each class is compared, on random numbers, with what ``make`` makes, by default ``RecurrentStates``.
    """
    for mixer in {type(mixer.module): mixer for mixer in mixers}.values():
        apart, limit = apart_from_own(mixer, hidden_size, make or RecurrentStates)
        if apart > limit:
            raise ModelRefused(
                f"layer {mixer.name} ({type(mixer.module).__name__}) computes in chunks what differs from its own "
                f"forward by {apart:.1e} of the largest number; rounding explains {limit:.0e}"
            )


def apart_from_own(
    mixer: Mixer, hidden_size: int, make: Callable[[StateCache], RecurrentStates]
) -> tuple[float, float]:
    """How far a mixer is from its own forward, as a share of the largest number, and how far rounding may bring it."""
    weight, own_forward = next(mixer.module.parameters()), mixer_hook.own_forward(mixer.module)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        texts = [torch.randn(1, length, hidden_size).to(weight) for length in _LENGTHS]
        expected = torch.cat([_output(own_forward(text)) for text in texts], dim=1)
        found = torch.cat(_in_chunks(mixer, texts, make), dim=1)
    return difference(found, expected), _TOLERANCE.get(weight.dtype, 0.0)


def _in_chunks(
    mixer: Mixer, texts: list[torch.Tensor], make: Callable[[StateCache], RecurrentStates]
) -> list[torch.Tensor]:
    """The outputs for both texts [1, tokens, hidden], computed side by side."""
    states = make(StateCache(mixer.states, len(texts), texts[0].device))
    request = Request("proof", (0,), SamplingParams(1))
    sequences = [Sequence(request, 0, [0] * text.shape[1], state_slot=slot) for slot, text in enumerate(texts)]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    with mixer_hook.bound(mixer.module, mixer_hook.SlottedMixer(states, 0)):
        for counts in _CHUNKS:
            starts = [sum(part.shape[1] for part in parts) for parts in found]
            chunks = [ScheduledChunk(*chunk) for chunk in zip(sequences, starts, counts, strict=True)]
            states.prepare(flatten(chunks, 1, windows=(), states=True))
            step = [text[:, start : start + count] for text, start, count in zip(texts, starts, counts, strict=True)]
            parts = _output(mixer.module(torch.cat(step, dim=1))).split(counts, dim=1)
            for done, part in zip(found, parts, strict=True):
                done.append(part)
    return [torch.cat(parts, dim=1) for parts in found]


def _output(result: Any) -> torch.Tensor:
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out
