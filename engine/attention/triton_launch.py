"""What the kernels of attention are compiled for and launched with: tiles, warps, stages of the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from triton import JITFunction

from engine.attention.base import AttentionOptions
from engine.attention.step_index import MOST_SPLITS
from engine.attention.triton_kernels import decode_kernel
from engine.cache.layout import KVShape

# So many programs for each processor keep one busy while others wait for memory.
PROGRAMS_PER_PROCESSOR = 4
# A tile of prefill: enough rows for the matrix units, in no more shared memory than this. On an H100, 128 rows with as
# many keys at once are 15 % faster over 16,384 tokens and 8 % slower over 1,024, and do not fit smaller cards.
_PREFILL_ROWS = 64
_QUERY_BYTES = 32 * 1024
# What tl.dot takes at least in every direction.
_DOT_SIZE = 16
# Shared memory that two tiles of keys and values may take.
_PIPELINE_BYTES = 64 * 1024
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
    widest = power_of_two(max(shape.key_size, shape.value_size))
    return {**_sizes(shape, block_size), "PAIRS": max(1, _WRITTEN_NUMBERS // widest), "FP8": fp8, "num_warps": 4}


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
    rows = power_of_two(heads // shape.heads)
    group_width = 1 << (heads // shape.heads - 1).bit_length()
    width = power_of_two(shape.value_size)
    return {
        **_attend_options(shape, heads, dtype, block_size, options, rows, None, fp8),
        "MOST_SPLITS": min(MOST_SPLITS, max(8, _JOINED_ROWS // group_width)),
        "GROUP_WIDTH": group_width,
        "JOINED": max(1, _JOINED_NUMBERS // (group_width * width)),
        "num_warps": 8 if rows * width > 64 * 128 else 4,
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
    most = _PREFILL_ROWS // 2 if dtype == torch.float32 else _PREFILL_ROWS  # more would not fit the registers
    fitting = min(most, _QUERY_BYTES // (power_of_two(shape.key_size) * dtype.itemsize))
    rows = rows or max(power_of_two(heads // shape.heads), fitting)
    return {
        **_attend_options(shape, heads, dtype, block_size, options, rows, keys, fp8),
        "num_warps": 8 if rows > 64 or rows * power_of_two(shape.value_size) > 64 * 128 else 4,
        "num_stages": _STAGES,
    }


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
    return {
        **sizes,
        "HEADS": heads,
        "ROWS": rows,
        "KEYS": keys or _keys_per_tile((sizes["KEY_WIDTH"] + sizes["VALUE_WIDTH"]) * dtype.itemsize),
        "WINDOW": options.sliding_window or 0,
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
        "KEY_WIDTH": power_of_two(shape.key_size),
        "VALUE_WIDTH": power_of_two(shape.value_size),
        "BLOCK_SIZE": block_size,
    }


def power_of_two(size: int) -> int:
    """The next one, and no less than tl.dot takes."""
    return max(_DOT_SIZE, int(1 << (size - 1).bit_length()))


def _keys_per_tile(bytes_per_key: int) -> int:
    """As many keys at once as the pipeline's memory holds twice, a power of two from 16 to 64."""
    fitting = _PIPELINE_BYTES // (2 * bytes_per_key)
    return min(64, power_of_two(fitting // 2 + 1))
