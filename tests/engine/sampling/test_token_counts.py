"""Tokens are counted once, however long the answer grows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from test_sampler import sequence

from engine.sampling.token_counts import TokenCounts


class Watched(list[int]):
    """Counts the tokens that are read."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.read += len(found) if isinstance(key, slice) else 1
        return found


def test_a_step_looks_at_what_it_added() -> None:
    owner = sequence(tuple(n % 7 for n in range(2000)), position=300)
    owner.tokens = Watched(owner.tokens)
    counts = TokenCounts(with_prompt=True)
    counts.update(owner)
    assert owner.tokens.read == 2000
    for token in (3, 11, 3):
        owner.tokens.append(token)
        counts.update(owner)
    assert owner.tokens.read == 2003
    assert dict(zip(counts.ids, counts.counts, strict=True)) == Counter(owner.sampled)


def test_the_prompt_counts_nothing_and_is_there_where_it_matters() -> None:
    owner = sequence((5, 0, 5), position=4)
    for with_prompt, expected in ((True, {0: 1, 5: 2}), (False, {5: 2, 0: 1})):
        counts = TokenCounts(with_prompt)
        counts.update(owner)
        assert list(zip(counts.ids, counts.counts, strict=True)) == list(expected.items())
    unsaid = TokenCounts(with_prompt=True)
    unsaid.update(sequence(position=4))
    assert (list(unsaid.ids), list(unsaid.counts)) == ([0], [0])


def test_tokens_that_were_taken_back_do_not_count() -> None:
    owner = sequence((5, 6, 6))
    counts = TokenCounts(with_prompt=False)
    counts.update(owner)
    owner.tokens.pop()
    counts.update(owner)
    assert dict(zip(counts.ids, counts.counts, strict=True)) == {5: 1, 6: 1}
