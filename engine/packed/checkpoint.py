"""The weights of a folder of safetensors by the names that a model has for them, in blocks where they can be.

What becomes of the tensors of a class's checkpoints is transformers' to say (``conversion_mapping``): renamings, then
at most one conversion, such as experts stacked, or queries, keys and values taken apart. What moves whole rows is done
on blocks as it is on numbers, since each row has its own; all else is done on numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.api.errors import ModelRefused
from engine.packed.encoders import in_blocks
from engine.packed.experts import holds_experts
from engine.packed.places import Place, places_of
from engine.packed.published_schemes import BF16
from engine.packed.schemes import Blocks, Scheme
from engine.packed.tensor_files import TensorFile, open_files
from engine.quantised.method import Method

IGNORED = "ignored"
_NUMBERS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Source:
    """A weight of a checkpoint, by the name that it has there, or would have without quantisation."""

    name: str
    parts: dict[str, tuple[TensorFile, str]]
    method: Method | None

    def read(self) -> Blocks | torch.Tensor:
        """In blocks, if it is quantised and a scheme holds it, else its numbers."""
        tensors = {role: file.tensor(name) for role, (file, name) in self.parts.items()}
        if self.method is None:
            return tensors["weight"]
        try:
            return self.method.read(tensors)
        except ModelRefused as refusal:
            raise ModelRefused(f"{self.name}: {refusal}") from refusal

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        found = self.read()
        return found.unpacked(dtype) if isinstance(found, Blocks) else found.to(dtype)

    def kind(self) -> str | None:
        """The type of its numbers in the words of safetensors; None if it is quantised."""
        if self.method is not None:
            return None
        file, name = self.parts["weight"]
        return file.described(name)[0]

    def signature(self) -> tuple[object, ...]:
        """What the scheme of its blocks depends on."""
        return tuple((role, *file.described(name)) for role, (file, name) in sorted(self.parts.items()))


@dataclass(slots=True)
class Conversion:
    """What is done to sources, by the pattern that each one matched, so that they become weights of the model.

    ``name`` is that of the first of these weights. Without a ``converter`` the one source is the one weight.
    """

    name: str
    model: Any
    converter: Any = None
    sources: dict[str, list[Source]] = field(default_factory=dict)

    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.name]
        first, *others = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in others)]

    def all_sources(self) -> list[Source]:
        return [source for group in self.sources.values() for source in group]

    def run(self, found: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The weights of the model, by name."""
        if self.converter is None:
            ((tensor,),) = found.values()
            return {self.name: tensor}
        converter = copy(self.converter)
        converter.collected_tensors = dict(found)
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def transposes(self) -> bool:
        return self.converter is not None and any(isinstance(step, Transpose) for step in self.converter.operations)

    def keeps_rows(self, dimensions: int) -> bool:
        """Whether nothing looks into the rows of sources of so many dimensions: then it may be run on their blocks."""
        for step in () if self.converter is None else self.converter.operations:
            match step:
                case MergeModulelist(dim=0):
                    dimensions += 1
                case Concatenate() | Chunk() | Split() | Interleave() if step.dim % dimensions < dimensions - 1:
                    pass
                case PermuteForRope() if dimensions == 2:
                    pass
                case ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1):
                    dimensions += 1
                case _:
                    return False
        return True


class CheckpointWeight:
    """A weight of the model: ``Stored``, by what a conversion makes of tensors of files."""

    def __init__(self, place: Place, conversion: Conversion, choice: str, schemes: dict[object, Scheme | None]) -> None:
        self.place = place
        self._conversion = conversion
        self._chosen = place.scheme(choice)
        self._schemes = schemes  # of sources of one signature, shared by all weights

    def shape(self) -> torch.Size:
        """As ``Place`` has it."""
        return self.place.shape

    def scheme(self) -> Scheme | None:
        """That of its blocks. Reads one weight of each signature."""
        first = self._conversion.all_sources()[0]
        if first.method is None:
            return self._chosen or (BF16 if first.kind() == "BF16" and self._may_move() else None)
        key = (first.signature(), self.place.kind)
        if key not in self._schemes:
            found = self.blocks()
            self._schemes[key] = None if found is None else found.scheme
        return self._schemes[key]

    def blocks(self) -> Blocks | None:
        """Its blocks; None where its sources have none, have others than each other, or their rows are taken apart."""
        found = self._moved() or self._quantised_at_last()
        if found is not None and found.shape != self.place.shape:
            raise ModelRefused(
                f"the checkpoint has {self.place.name} as {list(found.shape)}, but its config.json describes "
                f"{list(self.place.shape)}; they do not belong to the same model"
            )
        return found

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Its numbers, as the class has them; those that the checkpoint has, also where ``blocks`` rounds them."""
        sources = self._conversion.sources
        read = {pattern: [source.numbers(dtype) for source in group] for pattern, group in sources.items()}
        made = self._conversion.run(read)[self.place.name]
        if self._conversion.transposes() or any(one.method is None for one in self._conversion.all_sources()):
            return made
        if self.place.kind == "other" and made.dim() == 3 and self._conversion.converter is None:
            # Experts in a stack, in a class that does not say which way round it has them.
            if made.shape[1] == made.shape[2]:
                raise ModelRefused(f"which way round the class has {self.place.name} {list(made.shape)} is not known")
            return made if made.shape == self.place.shape else made.mT.contiguous()
        return made.mT.contiguous() if self.place.transposed else made

    def _may_move(self) -> bool:
        """Whether what is done to its sources may be done to their blocks."""
        source = self._conversion.all_sources()[0]
        if self.place.transposed and source.method is None and self._conversion.converter is not None:
            return False  # as the class has them, and each converter in its own way
        merged = len(self._conversion.all_sources()) > len(self._conversion.sources)
        return self._conversion.keeps_rows(len(self.place.shape) - merged)

    def _moved(self) -> Blocks | None:
        """By moving blocks of its sources."""
        if not self._may_move():
            return None
        read: dict[str, list[Blocks]] = {}
        for pattern, group in self._conversion.sources.items():
            found = [self._in_blocks(source) for source in group]
            read[pattern] = [one for one in found if one is not None]
            if len(read[pattern]) < len(group):
                return None
        first, *others = [one for group in read.values() for one in group]
        for other in others:
            if other.scheme is not first.scheme or first.order is not None or other.order is not None:
                return None
        made = self._conversion.run({pattern: [one.data for one in group] for pattern, group in read.items()})
        return Blocks(made[self.place.name], first.scheme, first.order)

    def _in_blocks(self, source: Source) -> Blocks | None:
        found = source.read()
        if isinstance(found, Blocks):
            return found
        if source.method is not None or found.dim() < 2:
            return None
        rows = found.mT if self.place.transposed else found
        if self._chosen is not None:
            return self._quantised(rows)
        if found.dtype is torch.bfloat16:
            return Blocks(rows.contiguous().view(torch.uint8), BF16)
        return None

    def _quantised_at_last(self) -> Blocks | None:
        """By quantising what the conversion has made, where rows are taken apart on the way."""
        if self._chosen is None:
            return None
        made = self.numbers(torch.float32)
        return self._quantised(made.mT if self.place.transposed else made)

    def _quantised(self, rows: torch.Tensor) -> Blocks:
        assert self._chosen is not None
        try:
            return in_blocks(rows, self._chosen)
        except ModelRefused as refusal:
            raise ModelRefused(f"{self.place.name}: {refusal}") from refusal


def weights_of(folder: Path, model: Any, method: Method | None, choice: str = "none") -> dict[str, CheckpointWeight]:
    """The weights in a folder by the names of ``model``, which needs no memory. Reads the headers of files alone.

    ``method`` is that of the checkpoint's ``quantization_config``, ``choice`` that of ``quantize``. Raises
    ``ModelRefused`` for tensors that would be read wrongly, or left out although the model has a place for what they
    belong to.
    """
    sources = _sources(open_files(folder), method)
    known, places = model.state_dict(), places_of(model)
    conversions, unknown = _conversions(sources, model, known)
    _require_meant(unknown, model)
    schemes: dict[object, Scheme | None] = {}
    weights: dict[str, CheckpointWeight] = {}
    for conversion in conversions:
        _require_numbers(conversion, places)
        for name in known.keys() & conversion.targets():
            place = places.get(name) or Place(name, known[name].shape, "other", transposed=False, of_vocabulary=False)
            weights[name] = CheckpointWeight(place, conversion, choice, schemes)
    return weights


def _sources(tensors: Mapping[str, TensorFile], method: Method | None) -> list[Source]:
    """The weights of a checkpoint, in the order in which transformers would stack them."""
    grouped = {} if method is None else method.grouped(tensors.keys())
    used = {part for parts in grouped.values() for part in parts.values()}
    found = [Source(name, {"weight": (file, name)}, None) for name, file in tensors.items() if name not in used]
    for name, parts in grouped.items():
        if absent := sorted(part for part in parts.values() if part not in tensors):
            raise ModelRefused(f"the weight {name} has no tensor {absent[0]}; the checkpoint is damaged")
        meant = {role: (tensors[part], part) for role, part in parts.items() if not role.startswith(IGNORED)}
        if meant:
            found.append(Source(name, meant, method))
    return sorted(found, key=lambda source: dot_natural_key(source.name))


def _conversions(
    sources: Iterable[Source], model: Any, known: Mapping[str, object]
) -> tuple[list[Conversion], list[tuple[str, Source]]]:
    """What becomes of sources, and those that the model does not know, each with the name that it would have there.

    As transformers' ``convert_and_load_state_dict_in_model`` decides it.
    """
    mapping = get_model_conversion_mapping(model) + _of_single_experts(model)
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Conversion] = {}
    unknown: list[tuple[str, Source]] = []
    for source in sources:
        name, pattern = rename_source_key(source.name, renamings, converters, prefix, known)
        if name not in known and source.name in known:
            name, pattern = rename_source_key(source.name, [], [], prefix, known)
        if name not in known:
            unknown.append((name, source))
            continue
        converter = None if pattern is None else deepcopy(by_pattern[pattern])
        conversion = found.setdefault(name, Conversion(name, model, converter))
        conversion.sources.setdefault(pattern or source.name, []).append(source)
    return list(found.values()), unknown


def _of_single_experts(model: Any) -> list[Any]:
    """What makes stacks of experts that lie singly, also for classes that are published with stacks.

    Tools that quantise have each expert as a linear map of its own, and write it so.
    """
    experts = [module for module in model.modules() if holds_experts(module, "down_proj")]
    if any(not module.is_concatenated or module.is_transposed or not module.has_gate for module in experts):
        return []
    return get_checkpoint_conversion_mapping("qwen2_moe") if experts else []


def _require_meant(unknown: Iterable[tuple[str, Source]], model: Any) -> None:
    """Refuse tensors of modules that the model has: left out, it would be another model.

    Others belong to what the class does not compute, such as layers that guess tokens ahead. A bias of zeros changes
    nothing; some tools write it for every layer.
    """
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    modules = {
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    buffers = {name for name, _ in model.named_buffers()}
    for name, source in unknown:
        if name.rpartition(".")[0] not in modules or name in buffers or any(one.search(name) for one in ignored):
            continue
        if name.endswith(".bias") and source.method is None and not source.numbers(torch.float32).any():
            continue
        raise ModelRefused(f"the checkpoint has a tensor {source.name} that {type(model).__name__} has no place for")


def _require_numbers(conversion: Conversion, places: Mapping[str, Place]) -> None:
    """Refuse digits whose scales nobody knows."""
    for source in conversion.all_sources():
        kind = source.kind()
        if kind is not None and kind not in _NUMBERS and conversion.name in places:
            raise ModelRefused(
                f"the checkpoint has {source.name} in {kind}, but its quantization_config does not say how to read it"
            )
