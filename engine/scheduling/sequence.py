"""A sequence of tokens in the engine, and the chunk of it that a step computes. No torch."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.api.requests import Request


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One candidate of one request, from its first prefill to its last token.

    ``tokens`` is the prompt followed by the sampled tokens. The keys and values of the first ``num_computed`` of
    them are in ``blocks``: token ``i`` in slot ``i % block_size`` of ``blocks[i // block_size]``. ``blocks`` is an
    array because each step copies it whole, which takes milliseconds from a list if contexts are long. It is the table
    of layer group 0; ``other_tables`` are those of the further groups, laid out alike. Of each group's table, the first
    ``passed`` entries are no longer held: the group's window sees them no more. All tables have
    blocks for the first ``reach`` tokens. ``block_keys`` identify the content of its first full blocks, as far as that
    was asked for. ``num_cached_tokens`` is the part of the prompt that was found in the prefix cache.

    Where steps are launched ahead, ``num_launched`` counts the tokens that are computed once the launched steps are
    done, and ``num_unread`` (0 or 1) those that a launched step samples and the host has not read: the newest one is
    row ``unread_row`` of that step's tokens. ``runs_ahead`` says whether it may be computed before it is read.
    ``num_rewinds`` counts how often something launched was discarded. It ends with ``most_tokens``, prompt included.

    Where layers carry states, they are in ``state_slot`` while it runs. The chunk that begins at ``state_start`` finds
    there what is in slot ``state_source``, or with None zeros. With ``has_lost_states`` something that was discarded
    has advanced them, so that they are no longer those of its computed tokens.

    With ``is_long`` all of its tokens are computed as those of a text beyond the model's original context (LongRoPE).
    """

    request: Request
    candidate: int
    tokens: list[int]
    num_computed: int = 0
    num_launched: int = 0
    num_unread: int = 0
    unread_row: int = 0
    runs_ahead: bool = False
    num_rewinds: int = 0
    most_tokens: int = 0
    num_cached_tokens: int = 0
    blocks: MutableSequence[int] = field(default_factory=lambda: array("i"))
    other_tables: tuple[MutableSequence[int], ...] = ()
    passed: list[int] = field(default_factory=list)
    reach: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    state_slot: int = 0
    state_start: int = 0
    state_source: int | None = None
    has_lost_states: bool = False
    is_long: bool = False

    @property
    def tables(self) -> tuple[MutableSequence[int], ...]:
        """The block tables of all layer groups."""
        return (self.blocks, *self.other_tables)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_known(self) -> int:
        """Its tokens, with those that only the device knows."""
        return len(self.tokens) + self.num_unread

    def rewind(self) -> None:
        """Forget what was launched and is not committed; a step that is in flight counts no longer."""
        self.has_lost_states |= self.num_launched > self.num_computed
        self.num_launched = self.num_computed
        self.num_unread = 0
        self.num_rewinds += 1

    @property
    def sampled(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


class ScheduledChunk(NamedTuple):
    """Compute the tokens ``[start, start + num_tokens)`` of a sequence; their blocks are allocated.

    Where layers carry states, a copy of those after the chunk is kept in slot ``snapshot``, if there is one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    snapshot: int | None = None

    @property
    def samples(self) -> bool:
        """Whether this chunk ends at the last token, so that the next one is sampled from its logits.

        Until it is launched: then its sequence has one token more.
        """
        return self.start + self.num_tokens == len(self.sequence.tokens) + self.sequence.num_unread
