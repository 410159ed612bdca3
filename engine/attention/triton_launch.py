"""What the kernels of attention are compiled for and launched with: tiles, warps, stages of the pipeline."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from triton import JITFunction

from engine.attention.base import AttentionOptions
from engine.attention.step_index import MOST_SPLITS
from engine.attention.triton_kernels import decode_kernel
from engine.cache.layout import KVShape

# So many programs for each processor keep one busy while others wait for memory. Of latent attention there is room for
# one: its 32 rows of 512 sums take half of the registers.
PROGRAMS_PER_PROCESSOR, LATENT_PROGRAMS = 4, 1
# A tile of prefill: enough rows for the matrix units, in no more shared memory than this. On an H100, 128 rows with as
# many keys at once are 15 % faster over 16,384 tokens and 8 % slower over 1,024, and do not fit smaller cards.
_PREFILL_ROWS = 64
_QUERY_BYTES = 32 * 1024
# Rows of all tiles of latent attention, and the most keys at once: with 64 rows, the sums of 512 values alone would
# take half of the registers that a thread may have, and 48 to 184 bytes of each thread lie in local memory (as compiled
# for 8.0 and 9.0; 64 keys at once have the same effect).
_LATENT_ROWS = 32
# What tl.dot takes at least in every direction.
_DOT_SIZE = 16
# Shared memory that two tiles of keys and values may take; more where one tile is both, as there is no third one to
# hold: two of 32 latent keys of 576 numbers in bfloat16 take 72 KiB of the 99 KiB that small cards have.
_PIPELINE_BYTES, _LATENT_BYTES = 64 * 1024, 80 * 1024
# Stages of the pipeline. More are slower: with five, decodes of 64 sequences read 13 % fewer bytes a second on an H100.
_STAGES = 3
# Numbers of shared decodes that are read at once when they are joined: more would take more than the 128 registers
# with which four programs fit a processor. And the most query heads times shares.
_JOINED_NUMBERS = 4096
_JOINED_ROWS = 1024
# Numbers that one program writes to the blocks, 16 bytes of bfloat16 for each thread of four warps.
_WRITTEN_NUMBERS = 1024
_INTERPRETED = not isinstance(decode_kernel, JITFunction)


def write_options(shape: KVShape, block_size: int, *, fp8: bool = False) -> dict[str, Any]:
    """What ``write_kernel`` is compiled for."""
    sizes = _sizes(shape, block_size)
    widest = max(sizes["KEY_WIDTH"], sizes["VALUE_WIDTH"])
    return {**sizes, "PAIRS": max(1, _WRITTEN_NUMBERS // widest), "FP8": fp8, "num_warps": 4}


def decode_options(
    shape: KVShape,
    heads: int,
    dtype: torch.dtype,
    block_size: int,
    options: AttentionOptions,
    *,
    fp8: bool = False,
) -> dict[str, Any]:
    """What ``decode_kernel`` is compiled for: a layer of ``heads`` query heads that computes in ``dtype``."""
    group, width = heads // shape.heads, power_of_two(shape.value_size)
    rows = power_of_two(group)
    if shape.values_in_keys:
        rows = min(rows, _LATENT_ROWS)
    span = -(-group // -(-group // rows))
    span_width = 1 << (span - 1).bit_length()
    joined_heads = min(span_width, max(1, _JOINED_NUMBERS // width))
    return {
        **_attend_options(shape, heads, dtype, block_size, options, rows, None, fp8),
        "SPAN": span,
        "MOST_SPLITS": min(MOST_SPLITS, max(8, _JOINED_ROWS // span_width)),
        "JOINED_HEADS": joined_heads,
        "JOINED": max(1, _JOINED_NUMBERS // (joined_heads * width)),
        "num_warps": _warps(shape, rows),
        "num_stages": _STAGES,
    }


def prefill_options(
    shape: KVShape,
    heads: int,
    dtype: torch.dtype,
    block_size: int,
    options: AttentionOptions,
    *,
    fp8: bool = False,
    rows: int | None = None,
    keys: int | None = None,
) -> dict[str, Any]:
    """What ``prefill_kernel`` is compiled for.

    ``rows`` of a tile (query heads of one kv head times queries) and ``keys`` at once are for those who measure others
    than our choice.
    """
    group = heads // shape.heads
    if shape.values_in_keys:
        rows = rows or _LATENT_ROWS
        # Parts of equally many heads that leave the fewest rows of a tile empty.
        span = max((part for part in range(1, rows + 1) if group % part == 0), key=partial(_filled, rows))
    else:
        most = _PREFILL_ROWS // 2 if dtype == torch.float32 else _PREFILL_ROWS  # more would not fit the registers
        fitting = min(most, _QUERY_BYTES // (power_of_two(shape.key_size) * dtype.itemsize))
        rows, span = rows or max(power_of_two(group), fitting), group
    return {
        **_attend_options(shape, heads, dtype, block_size, options, rows, keys, fp8),
        "SPAN": span,
        "num_warps": 8 if rows > 64 else _warps(shape, rows),
        "num_stages": _STAGES,
    }


def parts(shape: KVShape, heads: int, options: dict[str, Any]) -> int:
    """Into how many programs the query heads of all kv heads are divided."""
    span: int = options["SPAN"]
    return shape.heads * -(-(heads // shape.heads) // span)


def _filled(rows: int, part: int) -> int:
    return rows // part * part


def _warps(shape: KVShape, rows: int) -> int:
    """More registers for the sums of wide tiles, and of latents, whose tiles meet two products."""
    most = 64 * 128 // (2 if shape.values_in_keys else 1)
    return 8 if rows * power_of_two(shape.value_size) > most else 4


def _attend_options(
    shape: KVShape,
    heads: int,
    dtype: torch.dtype,
    block_size: int,
    options: AttentionOptions,
    rows: int,
    keys: int | None,
    fp8: bool,
) -> dict[str, Any]:
    sizes = _sizes(shape, block_size)
    bytes_per_key = (sizes["KEY_WIDTH"] + sizes["VALUE_WIDTH"]) * dtype.itemsize
    if shape.values_in_keys:
        fitting = min(_LATENT_ROWS, _keys_per_tile(_LATENT_BYTES, bytes_per_key))
    else:
        fitting = _keys_per_tile(_PIPELINE_BYTES, bytes_per_key)
    return {
        **sizes,
        "HEADS": heads,
        "ROWS": rows,
        "KEYS": keys or fitting,
        "WINDOW": -options.chunk_size if options.chunk_size else options.sliding_window or 0,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "WIDEN": _INTERPRETED and (dtype == torch.bfloat16 or (fp8 and dtype == torch.float16)),
        "FP8": fp8,
    }


def _sizes(shape: KVShape, block_size: int) -> dict[str, Any]:
    return {
        "KV_HEADS": shape.heads,
        "KEY_SIZE": shape.key_size,
        "VALUE_SIZE": shape.value_size,
        "KEY_WIDTH": power_of_two(shape.key_size - (shape.value_size if shape.values_in_keys else 0)),
        "VALUE_WIDTH": power_of_two(shape.value_size),
        "BLOCK_SIZE": block_size,
        "LATENT": shape.values_in_keys,
    }


def power_of_two(size: int) -> int:
    """The next one, and no less than tl.dot takes."""
    return max(_DOT_SIZE, int(1 << (size - 1).bit_length()))


def _keys_per_tile(most_bytes: int, bytes_per_key: int) -> int:
    """As many keys at once as this memory holds twice, a power of two from 16 to 64."""
    fitting = most_bytes // (2 * bytes_per_key)
    return min(64, power_of_two(fitting // 2 + 1))
