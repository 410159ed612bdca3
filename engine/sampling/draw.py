"""Draws tokens by the inverse of the cumulative distribution: exact, and rarely looking beyond the most likely tokens.

A full sort of a large vocabulary costs a hundred times what finding its 64 largest values does, and the token drawn is
nearly always among them. Rows for which that cannot be shown are ranked more widely, and finally in full.
"""

from __future__ import annotations

import numpy as np

from engine.api.sampling import SamplingParams

WIDTHS = (64, 1024)
"""How many tokens are ranked at first, and if these are too few."""
# A mass so large that every point but 0 lies beyond any cumulative sum; not infinite, because 0 times it must be 0.
UNKNOWN = float(np.finfo(np.float64).max)
# More parts than tokens that are wanted: few parts then hold two of these.
_PARTS_EACH = 8


def draw(logits: np.ndarray, sampling: SamplingParams, point: float) -> int:
    """One token of a row of finite ``logits`` [vocabulary], by a number in [0, 1).

    A ``top_k`` beyond the vocabulary is the whole vocabulary.
    """
    vocab_size, largest = len(logits), logits.max()
    divisor = max(np.float32(sampling.temperature), np.finfo(np.float32).tiny)
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    # One more than the row keeps shows that nothing equal was cut off.
    enough = top_k + 1
    for width in sorted(
        {min(max(w, enough) if enough <= WIDTHS[-1] else w, vocab_size) for w in (*WIDTHS, vocab_size)}
    ):
        columns = most_likely(logits, width)
        scores = (logits[columns] - largest) / divisor
        order = np.argsort(-scores, kind="stable")  # equals by their ids
        best, num_ranked = scores[order], len(order)
        weights = np.exp(best.astype(np.float64))
        cumulative = weights.cumsum()
        total = UNKNOWN
        if num_ranked == vocab_size:
            total = float(cumulative[-1])
        elif top_k == vocab_size:
            total = float(np.exp((logits - largest) / divisor).sum())
        kept = _surviving_mass(weights, cumulative, total, top_k, sampling)
        # Below the mass even after rounding, so that the token found has a share in it.
        target = min(point * kept, float(np.nextafter(kept, 0)))
        place = int(cumulative.searchsorted(target, side="right"))
        if num_ranked == vocab_size:
            place = min(place, vocab_size - 1)
            break
        # Tokens with the same score as the last one may have been left out: their order is not known here.
        if place < num_ranked and best[place] > best[-1]:
            break
    return int(columns[order[place]])


def most_likely(values: np.ndarray, width: int) -> np.ndarray:
    """The columns of the ``width`` largest of ``values`` [count], and perhaps of some more, ascending.

    All that equal one of them are among them.
    """
    part = len(values) // (_PARTS_EACH * width)
    if part < 2:
        return np.arange(len(values))
    whole = len(values) // part * part
    maxima = values[:whole].reshape(part, -1).max(axis=0)
    # So many parts have a number that is not smaller, and so the largest numbers are not smaller either.
    least = np.partition(maxima, -width)[-width]
    return np.flatnonzero(values >= least)


def _surviving_mass(
    weights: np.ndarray, cumulative: np.ndarray, total: float, top_k: int, sampling: SamplingParams
) -> float:
    """How much probability top_k, then top_p and then min_p leave, in the unit of ``weights``.

    ``weights`` [width] are those of the tokens in descending order, from 1, and may stop short of the vocabulary;
    ``cumulative`` are their sums, ``total`` is the whole row's mass. top_p keeps the fewest tokens whose share of what
    top_k left reaches it, at least one. min_p keeps those whose weight is at least this share of the largest one.
    ``UNKNOWN`` where the filters cut beyond the width.
    """
    width = len(weights)
    kept = float(cumulative[top_k - 1]) if top_k <= width else total
    if sampling.top_p < 1:
        if kept == UNKNOWN:
            return UNKNOWN
        reaching = int(cumulative.searchsorted(sampling.top_p * kept))
        kept = float(cumulative[reaching]) if reaching < width else UNKNOWN
    if not sampling.min_p:
        return kept
    likely = int((weights >= sampling.min_p).sum())
    # All filters keep the most likely tokens, so the one that keeps the fewest decides. Which one that is stays unknown
    # where min_p and the others cut beyond the width.
    if likely < width:
        return min(kept, float(cumulative[likely - 1]))
    return kept if kept <= cumulative[-1] else UNKNOWN
