"""Attention over the paged cache by our Triton kernels: the path of GPUs.

Everything that a step's kernels have to know crosses to the device as one array of integers; blocks are read where
they lie. Decodes spread each sequence over several programs where the batch alone would leave the device idle
("Flash-Decoding for long-context inference", Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from triton import JITFunction

from engine.attention.base import AttentionOptions
from engine.attention.staging import StagedNumbers
from engine.attention.triton_kernels import attend_kernel, join_kernel, write_kernel
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.scheduling.flat_batch import FlatBatch, StepShape

MAX_SPLITS = 32
# So many programs for each processor keep one busy while others wait for memory.
_PROGRAMS_PER_PROCESSOR = 4
# A tile of prefill: enough rows for the matrix units, in no more shared memory than this.
_PREFILL_ROWS = 64
_QUERY_BYTES = 32 * 1024
# What tl.dot takes at least in every direction.
_DOT_SIZE = 16
# Shared memory that two tiles of keys and values may take.
_PIPELINE_BYTES = 64 * 1024
# Stages of the pipeline. More are slower: with five, decodes of 64 sequences read 13 % fewer bytes a second on an H100.
_STAGES = 3
_TILE = 4
_INTERPRETED = not isinstance(attend_kernel, JITFunction)


class _Tiles(NamedTuple):
    """Where in the index tiles lie, and how many."""

    begin: int
    number: int


class TritonAttention:
    """``GraphAttention`` over a ``KVCache``. Windows come with each layer's options; ``_windows`` is for symmetry.

    ``processors`` is how many programs the device runs at once, by default its number of multiprocessors.
    """

    def __init__(self, cache: KVCache, _windows: Iterable[int | None] = (), processors: int | None = None) -> None:
        if cache.num_groups != 1:
            raise NotImplementedError(f"attention by Triton cannot compute layers of {cache.num_groups} groups")
        self._cache = cache
        self._processors = processors or _processors(cache.device)
        self._eager = StagedNumbers(1024, cache.device)
        self._static: StagedNumbers | None = None
        self._index = self._eager.numbers
        self._decodes = _Tiles(0, 0)
        self._prefills: dict[int, _Tiles] = {}
        # How many queries the layers take in a tile; learned from the first step, so that later ones are told in time.
        self._tile_queries: set[int] = set()
        # The step that is prepared; None while a step is recorded.
        self._batch: FlatBatch | None = None

    def prepare(self, batch: FlatBatch) -> None:
        batch.require_none("key_limits", by="attention by Triton")
        self._batch = batch
        self._upload(batch)

    def reserve(self, shapes: Sequence[StepShape], max_sequences: int, max_blocks: int) -> None:
        assert all(shape.only_decodes for shape in shapes), "only decodes are recorded"
        # Beside the tables of all, one entry for the table of the padding.
        self._static = StagedNumbers(max_sequences * (1 + _TILE + max_blocks) + 1, self._cache.device)

    def capture(self, shape: StepShape) -> None:
        assert self._static is not None, "reserve comes first"
        self._index = self._static.numbers
        self._decodes = _Tiles(shape.tokens, shape.tokens)
        self._prefills = {}
        self._batch = None

    def fill(self, batch: FlatBatch, shape: StepShape) -> None:
        assert self._static is not None, "reserve comes first"
        batch.require_none("key_limits", by="attention by Triton")
        numbers, decodes, _ = _laid_out(batch, ())
        assert decodes.number == shape.tokens, "a recorded step has decodes only"
        self._static.upload(numbers)

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        key_blocks, value_blocks = self._cache.keys[layer], self._cache.values[layer]
        keys, values = _steadily_strided(keys), _steadily_strided(values)
        key_size, value_size = keys.shape[2], values.shape[2]
        write_kernel[(keys.shape[0], keys.shape[1])](
            self._index,
            key_blocks,
            value_blocks,
            keys,
            values,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            KV_HEADS=keys.shape[1],
            KEY_SIZE=key_size,
            VALUE_SIZE=value_size,
            KEY_WIDTH=_power_of_two(key_size),
            VALUE_WIDTH=_power_of_two(value_size),
            num_warps=1,
        )

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        query = _steadily_strided(query)
        value_size = self._cache.values[layer].shape[3]
        out = query.new_empty(query.shape[0], query.shape[1], value_size)
        kv_heads = self._cache.keys[layer].shape[2]
        decode_rows, prefill_rows = tile_rows(query.shape[1], kv_heads, query.shape[2], query.dtype)
        if self._decodes.number:
            splits = min(MAX_SPLITS, self._processors * _PROGRAMS_PER_PROCESSOR // (self._decodes.number * kv_heads))
            self._attend(layer, query, options, out, self._decodes, decode_rows, max(1, splits))
        tiles = self._prefill_tiles(prefill_rows * kv_heads // query.shape[1])
        if tiles.number:
            self._attend(layer, query, options, out, tiles, prefill_rows, 1)
        return out

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        options: AttentionOptions,
        out: torch.Tensor,
        tiles: _Tiles,
        rows: int,
        splits: int,
    ) -> None:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        heads, shape = query.shape[1], KVShape(keys.shape[2], keys.shape[3], values.shape[3])
        sinks = options.sinks
        partial = stats = out
        if splits > 1:
            partial = out.new_empty((tiles.number, heads, splits, shape.value_size), dtype=torch.float32)
            stats = out.new_empty((tiles.number, heads, splits, 2), dtype=torch.float32)
        attend_kernel[(tiles.number, shape.heads, splits)](
            out,
            partial,
            stats,
            query,
            keys,
            values,
            out if sinks is None else sinks,
            self._index,
            tiles.begin,
            query.stride(0),
            query.stride(1),
            options.scaling,
            options.softcap or 1.0,
            **launch_options(shape, heads, keys.dtype, self._cache.block_size, options, rows, splits > 1),
        )
        if splits > 1:
            join_kernel[(tiles.number, heads)](
                out,
                partial,
                stats,
                self._index,
                tiles.begin,
                splits,
                HEADS=heads,
                VALUE_SIZE=shape.value_size,
                VALUE_WIDTH=_power_of_two(shape.value_size),
                MAX_SPLITS=MAX_SPLITS,
                num_warps=4,
            )

    def _prefill_tiles(self, queries: int) -> _Tiles:
        """The tiles of the step's chunks, each of at most ``queries`` tokens."""
        if queries not in self._tile_queries:
            self._tile_queries.add(queries)
            if self._batch is not None and not self._batch.only_decodes:
                self._upload(self._batch)
        return self._prefills.get(queries, _Tiles(0, 0))

    def _upload(self, batch: FlatBatch) -> None:
        numbers, self._decodes, self._prefills = _laid_out(batch, self._tile_queries)
        if len(numbers) > len(self._eager.numbers):
            self._eager = StagedNumbers(2 * len(numbers), self._cache.device)
        self._eager.upload(numbers)
        self._index = self._eager.numbers


def _laid_out(batch: FlatBatch, tile_queries: Iterable[int]) -> tuple[array[int], _Tiles, dict[int, _Tiles]]:
    """The index of a step (slots, tiles, tables), the tiles of its decodes, and those of its prefills by their size."""
    blocks = batch.only_group("attention by Triton")
    rows, lengths, positions = batch.query_starts, batch.query_lengths, batch.positions
    table_starts = blocks.table_starts
    if batch.only_decodes:
        prefills, decode_rows, decode_positions, decode_tables = [], rows, positions, table_starts
    else:
        prefills, decodes = batch.prefills, batch.decodes
        decode_rows = array("i", [rows[i] for i in decodes])
        decode_positions = array("i", [positions[row] for row in decode_rows])
        decode_tables = array("i", [table_starts[i] for i in decodes])
    counts = {queries: sum(-(-lengths[i] // queries) for i in prefills) for queries in tile_queries}
    numbers = blocks.slots[:]
    tables_at = len(numbers) + _TILE * (len(decode_rows) + sum(counts.values()))
    decode_tiles, prefill_tiles = _Tiles(len(numbers), len(decode_rows)), {}
    tiles = array("i", [1]) * (_TILE * len(decode_rows))
    tiles[0::_TILE] = decode_rows
    tiles[1::_TILE] = decode_positions
    tiles[3::_TILE] = array("i", [tables_at + start for start in decode_tables])
    numbers += tiles
    for queries, count in counts.items():
        prefill_tiles[queries] = _Tiles(len(numbers), count)
        for i in prefills:
            for row in range(rows[i], rows[i] + lengths[i], queries):
                size = min(queries, rows[i] + lengths[i] - row)
                numbers.extend((row, positions[row], size, tables_at + table_starts[i]))
    assert len(numbers) == tables_at
    return numbers + blocks.tables, decode_tiles, prefill_tiles


def launch_options(
    shape: KVShape,
    heads: int,
    dtype: torch.dtype,
    block_size: int,
    options: AttentionOptions,
    rows: int,
    split: bool,
    *,
    keys: int | None = None,
    stages: int = _STAGES,
) -> dict[str, Any]:
    """What ``attend_kernel`` is compiled for, for a layer of ``heads`` query heads and tiles of ``rows`` rows.

    ``keys`` at once and ``stages`` of the pipeline are for those who measure others than our choice.
    """
    key_width, value_width = _power_of_two(shape.key_size), _power_of_two(shape.value_size)
    keys = keys or _keys_per_tile((key_width + value_width) * dtype.itemsize)
    return {
        "HEADS": heads,
        "KV_HEADS": shape.heads,
        "KEY_SIZE": shape.key_size,
        "VALUE_SIZE": shape.value_size,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "BLOCK_SIZE": block_size,
        "ROWS": rows,
        "KEYS": keys,
        "WINDOW": options.sliding_window or 0,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "SPLIT": split,
        "WIDEN": _INTERPRETED and dtype == torch.bfloat16,
        "num_warps": 8 if rows * value_width > 64 * 128 else 4,
        "num_stages": stages,
    }


def tile_rows(heads: int, kv_heads: int, key_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows in a tile of a decode and in one of prefill: query heads of one key-value head times queries."""
    group = _power_of_two(heads // kv_heads)
    most = _PREFILL_ROWS // 2 if dtype == torch.float32 else _PREFILL_ROWS  # more would not fit the registers
    prefill: int = min(most, _QUERY_BYTES // (_power_of_two(key_size) * dtype.itemsize))
    return group, max(group, prefill)


def _steadily_strided(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens and heads as kernels take them: each head in one piece, strides multiples of 16 or the same in all steps.

    Kernels are compiled for strides that are known multiples of 16, and once more for others. What is that by chance in
    some steps would be compiled in a running server.
    """
    steady = tensor.stride(-1) == 1 and tensor.stride(0) % 16 == tensor.stride(1) % 16 == 0
    return tensor if steady else tensor.contiguous()


def _power_of_two(size: int) -> int:
    """The next one, and no less than tl.dot takes."""
    return max(_DOT_SIZE, int(1 << (size - 1).bit_length()))


def _keys_per_tile(bytes_per_key: int) -> int:
    """As many keys at once as the pipeline's memory holds twice, a power of two from 16 to 64."""
    fitting = _PIPELINE_BYTES // (2 * bytes_per_key)
    return min(64, _power_of_two(fitting // 2 + 1))


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
