"""Groups of layers that see equally much of the past, and so keep the same blocks of a sequence."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """How much of the past a layer sees, in tokens.

    A window of ``size`` tokens slides: each token sees the last ``size``, itself included. A ``chunked`` one jumps:
    each token sees those of its own chunk of ``size`` tokens, counted from the first token of the sequence (Llama 4).
    """

    size: int
    chunked: bool = False

    def first_seen(self, position: int) -> int:
        """The first token that the one at ``position`` sees. It never lies before that of an earlier position."""
        return position // self.size * self.size if self.chunked else max(0, position - self.size + 1)

    def most_blocks(self, launched: int, block_size: int) -> int:
        """The most blocks that a sequence holds of which ``launched`` tokens are computed at once.

        Window and launched tokens together touch one block more than they fill.
        """
        return -(-(self.size + launched) // block_size) + 1

    def __str__(self) -> str:
        return f"chunks of {self.size} tokens" if self.chunked else f"sliding window of {self.size}"


def sequence_blocks(window: Window | None, tokens: int, block_size: int, launched: int) -> int:
    """The most blocks that a sequence of so many ``tokens`` holds in a group, of which ``launched`` are computed at
    once."""
    every = -(-tokens // block_size)
    return every if window is None else min(every, window.most_blocks(launched, block_size))


class BlockGroup(NamedTuple):
    """The blocks of the layers that have one ``window``; None: they see everything."""

    num_blocks: int
    window: Window | None = None
