"""Attention over the paged cache by our Triton kernels: the path of GPUs.

Everything that a step's kernels have to know crosses to the device as one array of integers for each layer group
(``step_index``); blocks are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """``GraphAttention`` over a ``KVCache``.

    ``processors`` is how many programs the device runs at once, by default its number of multiprocessors.
    """

    def __init__(self, cache: KVCache, processors: int | None = None) -> None:
        self._cache = cache
        fewest_heads = min((keys.shape[2] for keys in cache.keys), default=1)
        latent = any(cache.values_in_keys)
        each = triton_launch.LATENT_PROGRAMS if latent else triton_launch.PROGRAMS_PER_PROCESSOR
        self._programs = max(1, (processors or _processors(cache.device)) * each // fewest_heads)
        # By layer group: buffers of steps that are launched kernel by kernel, those of recorded ones, and the step.
        self._eager = [StagedNumbers(1024, cache.device) for _ in range(cache.num_groups)]
        self._static: list[StagedNumbers] = []
        self._steps = [(staged.numbers, IndexLayout(0, 0, 0)) for staged in self._eager]
        self._layouts: dict[StepShape, IndexLayout] = {}
        self._shares: dict[tuple[int, int], _Shares] = {}

    def prepare(self, batch: FlatBatch) -> None:
        self._require_fitting(batch)
        for group, blocks in enumerate(batch.groups):
            numbers, layout = lay_out(batch, blocks, self._programs)
            if len(numbers) > len(self._eager[group].numbers):
                self._eager[group] = StagedNumbers(2 * len(numbers), self._cache.device)
            self._eager[group].upload(numbers)
            self._steps[group] = self._eager[group].numbers, layout

    def reserve(self, shapes: Sequence[StepShape], max_sequences: int, max_blocks: int) -> None:
        self._layouts = {shape: layout_of(shape, max_sequences, self._programs) for shape in shapes}
        # Beside the tables of all, that of the padding.
        needed = max(
            layout.tables_at + max_sequences * max_blocks + -(-shape.tokens // self._cache.block_size)
            for shape, layout in self._layouts.items()
        )
        self._static = [StagedNumbers(needed, self._cache.device) for _ in self._steps]

    def capture(self, shape: StepShape) -> None:
        assert self._static, "reserve comes first"
        self._steps = [(staged.numbers, self._layouts[shape]) for staged in self._static]

    def fill(self, batch: FlatBatch, shape: StepShape) -> None:
        assert self._static, "reserve comes first"
        self._require_fitting(batch)
        for staged, blocks in zip(self._static, batch.groups, strict=True):
            staged.upload(lay_out(batch, blocks, self._programs, self._layouts[shape])[0])

    def write_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, values = _steadily_strided(keys), _steadily_strided(values)
        cache = self._cache
        index, layout = self._step(layer)
        options = triton_launch.write_options(self._shape(layer), cache.block_size, fp8=cache.fp8)
        write_kernel[(-(-keys.shape[0] * keys.shape[1] // options["PAIRS"]),)](
            index,
            cache.keys[layer],
            cache.values[layer],
            *self._scales(layer),
            keys,
            values,
            layout.tokens,
            layout.tables_at,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            **options,
        )

    def attend(self, layer: int, query: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        query = _steadily_strided(query)
        out = query.new_empty(query.shape[0], query.shape[1], self._cache.values[layer].shape[3])
        _, layout = self._step(layer)
        if layout.work:
            self._attend_decodes(layer, query, options, out)
        if layout.chunks:
            self._attend_chunks(layer, query, options, out)
        return out

    def _attend_decodes(self, layer: int, query: torch.Tensor, options: AttentionOptions, out: torch.Tensor) -> None:
        (index, layout), shape, heads = self._step(layer), self._shape(layer), query.shape[1]
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
            index,
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
        (index, layout), shape, heads = self._step(layer), self._shape(layer), query.shape[1]
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
            index,
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

    def _step(self, layer: int) -> tuple[torch.Tensor, IndexLayout]:
        """The index of the step for a layer, and how it is laid out."""
        return self._steps[self._cache.groups[layer]]

    def _require_fitting(self, batch: FlatBatch) -> None:
        batch.require_none("key_limits", by="attention by Triton")
        if len(batch.groups) != self._cache.num_groups:
            raise ValueError(
                f"the step has {len(batch.groups)} layer groups, and the cache {self._cache.num_groups}; make both of "
                "the same layers"
            )

    def _scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of keys and values; without fp8, what no kernel looks at."""
        keys, values = self._cache.key_scales[layer], self._cache.value_scales[layer]
        index, _ = self._step(layer)
        return (index if keys is None else keys), (index if values is None else values)

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
