"""A step laid out flat: the tokens of all chunks one after another, and where each finds its past. No torch.

The runner builds it once for each step; attention backends, recorded steps and the C forward read it. Integers are
``array("i")``, which crosses to a device or to C code by one copy.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, compress, repeat
from operator import add, eq
from typing import Any, NamedTuple

from engine.api.block_groups import Window
from engine.scheduling.sequence import ScheduledChunk
from engine.scheduling.sequence import Sequence as OneSequence


class GroupBlocks(NamedTuple):
    """Where the chunks lie in the KV blocks of one layer group.

    ``tables`` are the block tables of the chunks one after another, each up to the chunk's last token; that of chunk
    ``i`` begins at ``table_starts[i]``. A block holds ``block_size`` tokens. Each chunk has ``lengths[i]`` tokens from
    position ``starts[i]`` on. What none of them sees through the group's ``window`` may be of others by now.
    """

    tables: array[int]
    table_starts: array[int]
    block_size: int
    starts: array[int]
    lengths: array[int]
    window: Window | None = None

    @property
    def slots(self) -> array[int]:
        """Where the keys and values of each token go [tokens]: block * block size + place in the block.

        Computed at each call, because a device that knows the tables finds the slots by itself.
        """
        slots, size, tables = array("i"), self.block_size, self.tables
        for table, start, length in zip(self.table_starts, self.starts, self.lengths, strict=True):
            if length == 1:
                slots.append(tables[table + start // size] * size + start % size)
                continue
            stop = start + length
            for number in range(start // size, (stop - 1) // size + 1):
                origin = (tables[table + number] - number) * size
                slots.extend(range(origin + max(start, number * size), origin + min(stop, (number + 1) * size)))
        return slots


class EmbeddingRows(NamedTuple):
    """Vectors that stand for tokens in place of the model's own embeddings.

    ``rows`` are the tokens' places in the batch, ascending; ``vectors`` is a float tensor [rows, hidden].
    """

    rows: array[int]
    vectors: Any


class StepShape(NamedTuple):
    """What the steps of one recording have in common: the number of ``tokens``, and whether each is a decode."""

    tokens: int
    only_decodes: bool


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """``tokens`` [tokens] of all chunks in the order of the chunks, and ``positions`` of each in its own sequence.

    A negative token ``-1 - r`` is one that only the device knows: row ``r`` of ``ModelRunner.sampled``.

    Chunk ``i`` has ``query_lengths[i]`` tokens from ``query_starts[i]`` on; a chunk of one token is a decode.
    ``sample_rows`` are the tokens whose logits are wanted. ``groups`` has one entry for each layer group.

    ``position_axes`` [axes][tokens] are what rotary embeddings count where they count several axes (M-RoPE); None means
    one axis, ``positions``. ``embeddings`` replace those of some tokens. ``key_limits`` [tokens] is the position
    before which each token sees keys (it may see later tokens of its own chunk); None means causal: its own position
    plus one.

    Where layers carry states, chunk ``i`` continues those in slot ``state_slots[i]``. Before the step, each of
    ``state_loads`` (source, slot) brings the states of a sequence that begins with it into its slot: those of another
    slot, or with the source None zeros. After the step, each of ``state_saves`` (slot, target) keeps a copy.

    Where long texts are rotated otherwise, ``long_tokens`` [tokens] is 1 for each token of one and else 0.

    Raises ``ValueError`` where one of these does not fit the tokens.
    """

    tokens: array[int]
    positions: array[int]
    query_starts: array[int]
    query_lengths: array[int]
    sample_rows: array[int]
    groups: tuple[GroupBlocks, ...]
    position_axes: tuple[array[int], ...] | None = None
    embeddings: EmbeddingRows | None = None
    key_limits: array[int] | None = None
    state_slots: array[int] = field(default_factory=lambda: array("i"))
    state_loads: tuple[tuple[int | None, int], ...] = ()
    state_saves: tuple[tuple[int, int], ...] = ()
    long_tokens: array[int] | None = None

    def __post_init__(self) -> None:
        count = len(self.tokens)
        for axis, numbers in enumerate(self.position_axes or ()):
            if len(numbers) != count:
                raise ValueError(
                    f"position_axes[{axis}] has {len(numbers)} positions for {count} tokens; give each one"
                )
        if self.long_tokens is not None and len(self.long_tokens) != count:
            raise ValueError(f"long_tokens has {len(self.long_tokens)} entries for {count} tokens; give each one")
        if self.embeddings is not None:
            rows, vectors = self.embeddings
            if len(rows) != len(vectors):
                raise ValueError(f"embeddings has {len(vectors)} vectors for {len(rows)} rows; give one for each row")
            if any(row <= before for before, row in zip([-1, *rows], [*rows, count], strict=True)):
                raise ValueError(f"embeddings.rows is {list(rows)}; give rows from 0 to {count - 1}, ascending")
        if self.key_limits is not None:
            if len(self.key_limits) != count:
                raise ValueError(f"key_limits has {len(self.key_limits)} limits for {count} tokens; give each one")
            for chunk, (start, length) in enumerate(zip(self.query_starts, self.query_lengths, strict=True)):
                for row in range(start, start + length):
                    first, last = self.positions[row] + 1, self.num_keys(chunk)
                    if not first <= self.key_limits[row] <= last:
                        raise ValueError(
                            f"key_limits[{row}] is {self.key_limits[row]}, but that token sees at least itself and at "
                            f"most the end of its chunk; give a limit from {first} to {last}"
                        )

    @property
    def only_decodes(self) -> bool:
        return len(self.tokens) == len(self.query_lengths)

    @property
    def decodes(self) -> list[int]:
        """The numbers of the chunks that have one token."""
        return [chunk for chunk, length in enumerate(self.query_lengths) if length == 1]

    @property
    def prefills(self) -> list[int]:
        """The numbers of the chunks that have several tokens."""
        return [chunk for chunk, length in enumerate(self.query_lengths) if length > 1]

    def num_keys(self, chunk: int) -> int:
        """How many keys the chunk's last token sees where nothing but causality limits it."""
        return self.positions[self.query_starts[chunk] + self.query_lengths[chunk] - 1] + 1

    def require_none(self, *fields: str, by: str) -> None:
        """Raise ``NotImplementedError`` for a step with one of the optional ``fields``, which ``by`` cannot compute."""
        for name in fields:
            if getattr(self, name) is not None:
                raise NotImplementedError(f"{by} cannot compute a step with {name}; torch and gathered attention can")

    def padded(
        self, shape: StepShape, scratch_blocks: Sequence[int], block_size: int, scratch_slot: int = 0
    ) -> FlatBatch:
        """This step with as many tokens as ``shape``; the keys and values of the missing ones go to the scratch block
        of each layer group.

        Missing decodes are the first token of a sequence each. Otherwise all missing tokens together are one chunk from
        position 0 on, whose block table repeats the scratch block. Where the step has states, theirs are those in
        ``scratch_slot``.
        """
        count = len(self.tokens)
        missing = shape.tokens - count
        if not missing:
            return self
        assert missing > 0, "the step has more tokens than the shape"
        assert self.only_decodes or not shape.only_decodes, "a chunk is no decode"
        self.require_none("position_axes", "embeddings", "key_limits", by="a recorded step")
        zeros = array("i", [0]) * missing
        if shape.only_decodes:
            chunks, positions, num_blocks = missing, zeros, 1
            query_starts, lengths = array("i", range(shape.tokens)), array("i", [1]) * shape.tokens
        else:
            chunks, positions, num_blocks = 1, array("i", range(missing)), (missing - 1) // block_size + 1
            query_starts, lengths = self.query_starts + array("i", [count]), self.query_lengths + array("i", [missing])
        return FlatBatch(
            tokens=self.tokens + zeros,
            positions=self.positions + positions,
            query_starts=query_starts,
            query_lengths=lengths,
            sample_rows=self.sample_rows,
            groups=tuple(
                GroupBlocks(
                    tables=blocks.tables + array("i", [scratch_block]) * num_blocks,
                    table_starts=blocks.table_starts + array("i", [len(blocks.tables)]) * chunks,
                    block_size=block_size,
                    starts=blocks.starts + zeros[:chunks],
                    lengths=lengths,
                    window=blocks.window,
                )
                for blocks, scratch_block in zip(self.groups, scratch_blocks, strict=True)
            ),
            state_slots=self.state_slots + array("i", [scratch_slot]) * chunks,
            state_loads=self.state_loads,
            state_saves=self.state_saves,
            long_tokens=None if self.long_tokens is None else self.long_tokens + zeros,
        )


def flatten(
    chunks: Sequence[ScheduledChunk],
    block_size: int,
    windows: Sequence[Window | None] = (None,),
    *,
    states: bool = False,
    long_rope: bool = False,
    position_axes: tuple[array[int], ...] | None = None,
    embeddings: EmbeddingRows | None = None,
    key_limits: array[int] | None = None,
) -> FlatBatch:
    """Lay out the tokens of ``chunks``, their blocks in the layer groups with these ``windows``, their ``states``, and
    with ``long_rope`` whether they are of long texts.

    Raises ``IndexError`` where a chunk reaches beyond the tokens or the block table of its sequence.
    """
    # Much of the host's time for a step is spent here, so what can be is done by loops in C.
    sequences, starts, counts, snapshots = zip(*chunks, strict=True) if chunks else ((), (), (), ())
    stops = list(map(add, starts, counts))
    query_starts = array("i", accumulate(counts, initial=0))
    total = query_starts.pop()
    if total == len(chunks):
        positions = array("i", starts)
        owners = zip(sequences, starts, strict=True)
        tokens = array("i", [-1 - s.unread_row if s.num_unread else s.tokens[start] for s, start in owners])
    else:
        tokens, positions = array("i"), array("i")
        for sequence, start, stop in zip(sequences, starts, stops, strict=True):
            if stop - start == 1:  # one number costs a quarter of a slice
                tokens.append(-1 - sequence.unread_row if sequence.num_unread else sequence.tokens[start])
                positions.append(start)
            else:
                tokens.extend(sequence.tokens[start:stop])
                positions.extend(range(start, stop))
        if len(tokens) != total:
            raise IndexError("a step reaches beyond the tokens of its sequences; schedule no more than are known")
    # A chunk samples if it ends at the last token, as ``ScheduledChunk.samples`` says.
    ends = map(add, query_starts, counts)
    samples = map(eq, stops, [len(sequence.tokens) + sequence.num_unread for sequence in sequences])
    firsts, lengths = array("i", starts), array("i", counts)
    groups = []
    for group, window in enumerate(windows):
        blocks = [sequence.other_tables[group - 1] if group else sequence.blocks for sequence in sequences]
        tables, table_starts = _joined_tables(blocks, stops, block_size)
        groups.append(GroupBlocks(tables, table_starts, block_size, firsts, lengths, window))
    return FlatBatch(
        tokens,
        positions,
        query_starts,
        lengths,
        array("i", [end - 1 for end in compress(ends, samples)]),
        tuple(groups),
        position_axes,
        embeddings,
        key_limits,
        *(_state_moves(sequences, starts, snapshots) if states else (array("i"), (), ())),
        array("i", chain.from_iterable(map(repeat, [s.is_long for s in sequences], counts))) if long_rope else None,
    )


def _state_moves(
    sequences: Sequence[OneSequence], starts: Sequence[int], snapshots: Sequence[int | None]
) -> tuple[array[int], tuple[tuple[int | None, int], ...], tuple[tuple[int, int], ...]]:
    """``state_slots``, ``state_loads`` and ``state_saves`` of a step."""
    slots = array("i", [sequence.state_slot for sequence in sequences])
    begun = [sequence for sequence, start in zip(sequences, starts, strict=True) if start == sequence.state_start]
    loads = tuple((sequence.state_source, sequence.state_slot) for sequence in begun)
    return slots, loads, tuple((slot, to) for slot, to in zip(slots, snapshots, strict=True) if to is not None)


def _joined_tables(
    blocks: Sequence[MutableSequence[int]], stops: Sequence[int], block_size: int
) -> tuple[array[int], array[int]]:
    """The block tables of the chunks one after another, each up to the token at ``stops``, and where each begins."""
    needed = [(stop - 1) // block_size + 1 for stop in stops]
    tables, table_starts = array("i"), array("i", accumulate(needed, initial=0))
    table_starts.pop()
    if needed == list(map(len, blocks)):
        for table in blocks:
            tables.extend(table)
        return tables, table_starts
    for table, number, stop in zip(blocks, needed, stops, strict=True):
        if len(table) < number:
            raise IndexError(
                f"a step reaches beyond the blocks of its sequences: {stop} tokens need {number} blocks of "
                f"{block_size} and have {len(table)}; allocate them before the step"
            )
        tables.extend(table[:number])
    return tables, table_starts
