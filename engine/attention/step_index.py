"""A step as the kernels of attention read it: one array of int32, laid out on the host in few operations.

Its parts, one after another:

- for each token its position in its sequence, then, for each token again, where its block table begins;
- five numbers for each work item of the decodes (the tokens of all, then the positions of all, and so on): the token,
  its position, where its table begins, which share of its keys this is, and how many shares there are (0: no item);
- how many chunks of several tokens there are, and two numbers for each: its first token, and its length;
- the block tables, whose places are counted from here.

Decodes with many keys are shared by several programs: "Flash-Decoding for long-context inference", Dao, Haziza, Massa
and Sizov, 2023. A step's shares are as long as the device needs to be busy, so that there are at most as many further
items as it runs programs, whatever the step is.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from engine.api.block_groups import Window
from engine.scheduling.flat_batch import FlatBatch, GroupBlocks, StepShape

# What one program should have at least: less does not pay for joining the shares.
MIN_SHARE = 128
MOST_SPLITS = 64
# A share may be this much longer than if all programs had equally many keys: batches of about as many sequences as
# programs stay unshared.
_SLACK = 1.25


class IndexLayout(NamedTuple):
    """Numbers of tokens, work items and chunks that an index has room for; where its parts begin follows."""

    tokens: int
    work: int
    chunks: int

    @property
    def work_at(self) -> int:
        return 2 * self.tokens

    @property
    def chunks_at(self) -> int:
        return self.work_at + 5 * self.work

    @property
    def tables_at(self) -> int:
        return self.chunks_at + 1 + 2 * self.chunks


def layout_of(shape: StepShape, max_sequences: int, programs: int) -> IndexLayout:
    """Room for any step of a shape: up to ``max_sequences`` chunks, and one of padding.

    ``programs`` is how many programs for one kv head keep the device busy.
    """
    if shape.only_decodes:
        return IndexLayout(shape.tokens, shape.tokens + programs, 0)
    most = max_sequences + 1
    return IndexLayout(shape.tokens, min(most, shape.tokens) + programs, min(most, shape.tokens // 2))


def lay_out(
    batch: FlatBatch, blocks: GroupBlocks, programs: int, layout: IndexLayout | None = None
) -> tuple[array[int], IndexLayout]:
    """The index of a step, in this ``layout`` or in just as much room as it needs."""
    rows, positions, tables, token_tables = _decodes(batch, blocks)
    splits, counts = _share(rows, positions, tables, programs, blocks.window)
    chunks = [] if batch.only_decodes else sorted(batch.prefills, key=batch.num_keys, reverse=True)
    starts, lengths = (
        array("i", [numbers[i] for i in chunks]) for numbers in (batch.query_starts, batch.query_lengths)
    )
    layout = layout or IndexLayout(len(batch.tokens), len(rows), len(chunks))
    assert layout.tokens == len(batch.tokens), "a recorded step has as many tokens as its shape"
    assert layout.work >= len(rows), "a recorded step has no more chunks than were reserved"
    assert layout.chunks >= len(chunks), "a recorded step has no more chunks than were reserved"
    numbers = batch.positions + token_tables
    work, chunk = array("i", [0]) * (layout.work - len(rows)), array("i", [0]) * (layout.chunks - len(chunks))
    for part in (rows, positions, tables, splits, counts):
        numbers += part
        numbers += work
    numbers.append(len(chunks))
    for part in (starts, lengths):
        numbers += part
        numbers += chunk
    numbers += blocks.tables
    return numbers, layout


def _decodes(batch: FlatBatch, blocks: GroupBlocks) -> tuple[array[int], array[int], array[int], array[int]]:
    """Tokens, positions and tables of the decodes, and the tables of all tokens."""
    if batch.only_decodes:
        return batch.query_starts[:], batch.positions[:], blocks.table_starts[:], blocks.table_starts
    rows, positions, tables, token_tables = (array("i") for _ in range(4))
    begin = 0
    for chunk in [*batch.prefills, len(batch.query_starts)]:
        # The decodes before it: neighbours among the chunks, and so among the tokens.
        run = batch.query_starts[begin:chunk]
        if run:
            rows += run
            positions += batch.positions[run[0] : run[-1] + 1]
            tables += blocks.table_starts[begin:chunk]
            token_tables += blocks.table_starts[begin:chunk]
        if chunk < len(batch.query_starts):
            token_tables += blocks.table_starts[chunk : chunk + 1] * batch.query_lengths[chunk]
        begin = chunk + 1
    return rows, positions, tables, token_tables


def _share(
    rows: array[int], positions: array[int], tables: array[int], programs: int, window: Window | None
) -> tuple[array[int], array[int]]:
    """Divide the decodes that see more than a share: their items come first, the others follow as they are.

    Changes ``rows``, ``positions`` and ``tables``; returns each item's share and the number of shares of its decode.
    The padding of recorded steps, first tokens, changes no share: a step has the same numbers, recorded or not.
    """
    # How many tokens each sees beside itself.
    seen = positions if window is None else [position - window.first_seen(position) for position in positions]
    size = max(MIN_SHARE, int(_SLACK * sum(seen)) // programs + 1)
    if not rows or max(seen) < size:
        return array("i", bytes(4 * len(rows))), array("i", [1]) * len(rows)
    shared = [place for place, count in enumerate(seen) if count >= size]
    shared.sort(key=seen.__getitem__, reverse=True)
    items: tuple[array[int], ...] = tuple(array("i") for _ in range(5))
    for place in shared:
        count = min(MOST_SPLITS, 1 + seen[place] // size)
        for part, number in zip(items, (rows[place], positions[place], tables[place], 0, count), strict=True):
            part.extend(array("i", [number]) * count)
        items[3][-count:] = array("i", range(count))
    for place in sorted(shared, reverse=True):
        del rows[place], positions[place], tables[place]
    alone = len(rows)
    for part, given in zip(items, (rows, positions, tables), strict=False):
        given[:0] = part
    return items[3] + array("i", bytes(4 * alone)), items[4] + array("i", [1]) * alone
