"""Prompts: the same for every server of a run, and never repeated, so that caches favour no server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from server.bench.wire.protocols import Call

# Common words: nearly every tokenizer has one token for each.
_COMMON = """
the of and to in is was for on that with as it at by from his were are this have had not but which be one all
their she when who will more no if out so said what up its about into than them can only other new some could
time these two may then do first any my now such like our over man me even most made after also did many before
must through back years where much your way well down should because each just those people how too little
state good very make world still own see men work long get here between both life being under never day same
another know while last might us great old year off come since against go came right used take three
"""
WORDS = _COMMON.split()

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "hero": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}},
        "chapters": {"type": "array", "items": {"type": "string"}, "minItems": 3},
    },
    "required": ["title", "hero", "chapters"],
}


class Prompts:
    """Numbers are never used twice in a run of a server; every server gets the same ones in the same order."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._numbers = count(seed * 100_000 + 1)

    def stories(self, number: int, max_tokens: int) -> list[Call]:
        """Short prompts that make a model write at length: some 45 tokens with the template of the built-in model."""
        return [
            Call(f"Tell me a story about the number {next(self._numbers)} and a dragon.", max_tokens)
            for _ in range(number)
        ]

    def words(self, number: int, prompt_words: int, max_tokens: int) -> list[Call]:
        """Prompts of about ``prompt_words`` tokens that share nothing but the template."""
        return [Call(f"{self.text(prompt_words)}. Go on.", max_tokens) for _ in range(number)]

    def text(self, words: int) -> str:
        """Words in a random order that has not been used before."""
        number = next(self._numbers)
        source = random.Random(number)
        return f"{number} " + " ".join(source.choices(WORDS, k=max(words, 1)))

    def conversations(self, number: int, prompt_words: int, max_tokens: int) -> list[Call]:
        """Lengths like those of ShareGPT: log-normal around these means, prompts spread wider than answers.

        Every call gives the same lengths but new words, so that loads differ only in their arrivals.
        """
        source = random.Random(self._seed)
        inputs = _lognormal(source, prompt_words, 1.0)
        outputs = _lognormal(source, max_tokens, 0.7)
        return [
            Call(f"{self.text(min(next(inputs), 4 * prompt_words))}. Go on.", min(next(outputs), 4 * max_tokens))
            for _ in range(number)
        ]


def _lognormal(source: random.Random, mean: float, sigma: float) -> Iterator[int]:
    """Whole numbers from 1 with this mean; ``sigma`` is the deviation of their logarithm."""
    while True:
        yield max(1, round(mean * source.lognormvariate(-sigma * sigma / 2, sigma)))
