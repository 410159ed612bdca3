"""Randomness without state: one uniform number for each (seed, candidate, position)."""

from __future__ import annotations

from functools import lru_cache

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, candidate: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same arguments on every machine.

    Each argument is added to the state times the golden-ratio increment and mixed, as in SplitMix64: Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; its finaliser is David Stafford's "Mix13"
    variant of MurmurHash3's. The seed counts modulo 2**64.
    """
    return (_mixed(_of_answer(seed, candidate), position) >> 11) * 2.0**-53


# An answer asks for a number at each of its tokens, and a batch for those of hundreds of answers.
@lru_cache(maxsize=4096)
def _of_answer(seed: int, candidate: int) -> int:
    return _mixed(_mixed(0, seed), candidate)


def _mixed(state: int, value: int) -> int:
    state = (state + (value + 1) * _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
