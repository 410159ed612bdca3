"""Attention over the paged cache by our Triton kernels: the path of GPUs.

Everything that a step's kernels have to know crosses to the device as one array of integers (``step_index``); blocks
are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.attention import triton_launch
from engine.attention.base import AttentionOptions
from engine.attention.step_index import IndexLayout, lay_out, layout_of
from engine.attention.triton_kernels import decode_kernel, prefill_kernel
from engine.attention.triton_write import write_kernel
from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.device.staging import StagedNumbers
from engine.scheduling.flat_batch import FlatBatch, StepShape


class TritonAttention:
    """``GraphAttention`` over a ``KVCache``. Windows come with each layer's options; ``_windows`` is for symmetry.

    ``processors`` is how many programs the device runs at once, by default its number of multiprocessors.
    """

    def __init__(self, cache: KVCache, _windows: Iterable[int | None] = (), processors: int | None = None) -> None:
        if cache.num_groups != 1:
            raise NotImplementedError(f"attention by Triton cannot compute layers of {cache.num_groups} groups")
        self._cache = cache
        fewest_heads = min((keys.shape[2] for keys in cache.keys), default=1)
        latent = any(cache.values_in_keys)
        each = triton_launch.LATENT_PROGRAMS if latent else triton_launch.PROGRAMS_PER_PROCESSOR
        self._programs = max(1, (processors or _processors(cache.device)) * each // fewest_heads)
        self._eager = StagedNumbers(1024, cache.device)
        self._static: StagedNumbers | None = None
        self._index = self._eager.numbers
        self._layout = IndexLayout(0, 0, 0)
        self._layouts: dict[StepShape, IndexLayout] = {}
        self._shares: dict[tuple[int, int], _Shares] = {}

    def prepare(self, batch: FlatBatch) -> None:
        batch.require_none("key_limits", by="attention by Triton")
        numbers, self._layout = lay_out(batch, batch.only_group("attention by Triton"), self._programs)
        if len(numbers) > len(self._eager.numbers):
            self._eager = StagedNumbers(2 * len(numbers), self._cache.device)
        self._eager.upload(numbers)
        self._index = self._eager.numbers

    def reserve(self, shapes: Sequence[StepShape], max_sequences: int, max_blocks: int) -> None:
        self._layouts = {shape: layout_of(shape, max_sequences, self._programs) for shape in shapes}
        # Beside the tables of all, that of the padding.
        needed = (
            layout.tables_at + max_sequences * max_blocks + -(-shape.tokens // self._cache.block_size)
            for shape, layout in self._layouts.items()
        )
        self._static = StagedNumbers(max(needed), self._cache.device)

    def capture(self, shape: StepShape) -> None:
        assert self._static is not None, "reserve comes first"
        self._index = self._static.numbers
        self._layout = self._layouts[shape]

    def fill(self, batch: FlatBatch, shape: StepShape) -> None:
        assert self._static is not None, "reserve comes first"
        batch.require_none("key_limits", by="attention by Triton")
        numbers, _ = lay_out(batch, batch.only_group("attention by Triton"), self._programs, self._layouts[shape])
        self._static.upload(numbers)

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, values = _steadily_strided(keys), _steadily_strided(values)
        cache = self._cache
        options = triton_launch.write_options(self._shape(layer), cache.block_size, fp8=cache.fp8)
        write_kernel[(-(-keys.shape[0] * keys.shape[1] // options["PAIRS"]),)](
            self._index,
            cache.keys[layer],
            cache.values[layer],
            *self._scales(layer),
            keys,
            values,
            self._layout.tokens,
            self._layout.tables_at,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            **options,
        )

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        query = _steadily_strided(query)
        out = query.new_empty(query.shape[0], query.shape[1], self._cache.values[layer].shape[3])
        if self._layout.work:
            self._attend_decodes(layer, query, options, out)
        if self._layout.chunks:
            self._attend_chunks(layer, query, options, out)
        return out

    def _attend_decodes(self, layer: int, query: torch.Tensor, options: AttentionOptions, out: torch.Tensor) -> None:
        layout, shape, heads = self._layout, self._shape(layer), query.shape[1]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        shares = self._shares_of(heads, shape.value_size)
        compiled = triton_launch.decode_options(
            shape, heads, self._cache.dtype, self._cache.block_size, options, fp8=self._cache.fp8
        )
        decode_kernel[(triton_launch.parts(shape, heads, compiled), layout.work)](
            out,
            shares.partial,
            shares.stats,
            shares.counters,
            query,
            keys,
            values,
            *self._scales(layer),
            out if options.sinks is None else options.sinks,
            self._index,
            layout.work_at,
            layout.work,
            layout.tables_at,
            query.stride(0),
            query.stride(1),
            options.scaling,
            options.softcap or 1.0,
            **compiled,
        )

    def _attend_chunks(self, layer: int, query: torch.Tensor, options: AttentionOptions, out: torch.Tensor) -> None:
        layout, shape, heads = self._layout, self._shape(layer), query.shape[1]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        compiled = triton_launch.prefill_options(
            shape, heads, self._cache.dtype, self._cache.block_size, options, fp8=self._cache.fp8
        )
        queries = compiled["ROWS"] // compiled["SPAN"]
        prefill_kernel[(triton_launch.parts(shape, heads, compiled), layout.tokens // queries + layout.chunks)](
            out,
            query,
            keys,
            values,
            *self._scales(layer),
            out if options.sinks is None else options.sinks,
            self._index,
            layout.tokens,
            layout.chunks_at,
            layout.chunks,
            layout.tables_at,
            query.stride(0),
            query.stride(1),
            options.scaling,
            options.softcap or 1.0,
            **compiled,
        )

    def _scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of keys and values; without fp8, what no kernel looks at."""
        keys, values = self._cache.key_scales[layer], self._cache.value_scales[layer]
        return (self._index if keys is None else keys), (self._index if values is None else values)

    def _shape(self, layer: int) -> KVShape:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        in_keys = self._cache.values_in_keys[layer]
        return KVShape(keys.shape[2], keys.shape[3], values.shape[3], values_in_keys=in_keys)

    def _shares_of(self, heads: int, value_size: int) -> _Shares:
        """Made once for layers alike and then kept: recorded steps have its address."""
        shares = self._shares.get((heads, value_size))
        if shares is None:
            shares = _Shares(2 * self._programs, heads, value_size, self._cache.device)
            self._shares[heads, value_size] = shares
        return shares


class _Shares:
    """What shared decodes leave for each other: sums of values and of weights by item, and counters that are 0."""

    def __init__(self, items: int, heads: int, value_size: int, device: torch.device) -> None:
        self.partial = torch.empty(items, heads, value_size, dtype=torch.float32, device=device)
        self.stats = torch.empty(items, heads, 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(items, heads, dtype=torch.int32, device=device)


def _steadily_strided(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens and heads as kernels take them: each head in one piece, strides multiples of 16 or the same in all steps.

    Kernels are compiled for strides that are known multiples of 16, and once more for others. What is that by chance in
    some steps would be compiled in a running server.
    """
    steady = tensor.stride(-1) == 1 and tensor.stride(0) % 16 == tensor.stride(1) % 16 == 0
    return tensor if steady else tensor.contiguous()


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
