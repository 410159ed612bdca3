"""Describes a supported model to the C code, whose weights are packed on the way.

What is supported is read from the structure (``structure.py``); that the results equal the model's own is shown by
comparison (``verify.py``, ``build.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from engine.cache.kv_tensors import KVCache
from engine.model.probe import ProbedLayer
from engine.native import library
from engine.native.errors import NotNative
from engine.native.mixtures import ACTIVATIONS, Branch, Gate, Map, Mixture
from engine.native.packing import PANEL, Panels, pack_floats, whole
from engine.native.products import PanelProduct
from engine.native.runner import Decoder
from engine.native.structure import Structure, read_structure
from engine.native.verify import Rotations, Turns, gain
from engine.packed.modules import PackedEmbedding, PackedLinear, held_by, is_packed, shape_of


def require_known(module: Any, probed: list[ProbedLayer], cache: KVCache) -> Structure:
    """The structure of a model. Raises ``NotNative`` for what the C code does not compute; nothing is changed."""
    if cache.dtype != torch.float32 or cache.device.type != "cpu":
        raise NotNative(f"it computes in {cache.dtype} on {cache.device}, not in float32 on a CPU")
    shapes = {layer.shape._replace(group=0) for layer in probed}
    if any(layer.window is not None and layer.window.chunked for layer in probed):
        raise NotNative("its layers attend in chunks")
    if not all(layer.writes for layer in probed):
        raise NotNative("some of its layers attend to the keys and values of others")
    if len(shapes) > 1 or any(s.key_size != s.value_size or s.key_size % PANEL for s in shapes):
        raise NotNative(f"its heads are not all of one size that is a multiple of {PANEL}")
    if cache.block_size % PANEL:
        raise NotNative(f"its blocks hold {cache.block_size} tokens, not a multiple of {PANEL}")
    return read_structure(module, probed)


def require_one_rotation(original_context: int | None, max_context: int) -> None:
    """Raises ``NotNative`` where a text of ``max_context`` tokens is rotated otherwise than a short one (LongRoPE).

    The C code has one table of cosines and sines for a layer, by position; two would be a second look-up for every
    token.
    """
    if original_context and original_context < max_context:
        raise NotNative(
            f"beyond {original_context} tokens its texts are rotated by other factors (longrope), and the C code has "
            f"one table of angles; a max_context of {original_context} leaves it one"
        )


def describe(
    structure: Structure,
    probed: list[ProbedLayer],
    cache: KVCache,
    rotations: Rotations,
) -> Decoder:
    """Pack the weights of a supported model. Each weight of ``module`` is freed once it is packed, so that the memory
    never has to hold both copies of the model."""
    return _Description(structure, cache).make(probed, rotations)


class _Description:
    def __init__(self, structure: Structure, cache: KVCache) -> None:
        self._structure = structure
        self._cache = cache
        self._kept: list[object] = [cache]
        self._tables: dict[int, tuple[int, int]] = {}

    def make(self, probed: list[ProbedLayer], rotations: Rotations) -> Decoder:
        structure = self._structure
        head, vocab_size = structure.head, structure.head.out_features
        layers = (library.Layer * len(probed))(*self._layers(probed, rotations))
        self._kept.append(layers)
        mixtures = [layer.mlp for layer in structure.layers if isinstance(layer.mlp, Mixture)]
        is_same = held_by(head) is held_by(structure.embedding) and head.bias is None
        embedding = self._matrix(head if is_same else structure.embedding)
        if is_same and not is_packed(head):  # nor does the embedding keep the weight
            structure.embedding.weight = head.weight
        model = library.Model(
            layers=layers,
            embedding=embedding,
            head=embedding if is_same else self._matrix(head),
            norm=self._norm(structure.norm),
            num_layers=len(probed),
            hidden=structure.hidden,
            intermediate=max(layer.mlp.widest for layer in structure.layers),
            heads=structure.heads,
            kv_heads=structure.kv_heads,
            size=structure.size,
            block_size=self._cache.block_size,
            max_context=rotations.positions,
            num_experts=max((mixture.count for mixture in mixtures), default=0),
            num_chosen=max((mixture.routing.chosen for mixture in mixtures), default=0),
            eps=structure.eps,
            embedding_scale=structure.lookup_scale * structure.vector_scale,
            branch_scale=structure.branch_scale,
            logit_scale=structure.logit_scale,
            logit_softcap=structure.logit_cap or 0.0,
        )
        return Decoder(model, vocab_size, structure.embedding.num_embeddings, structure.vector_scale, self._kept)

    def _layers(self, probed: list[ProbedLayer], rotations: Rotations) -> Iterator[library.Layer]:
        layers = zip(self._structure.layers, probed, rotations.of_layers, strict=True)
        for index, (layer, seen, turns) in enumerate(layers):
            cosines, sines = self._table(turns)
            options = seen.options
            yield library.Layer(
                qkv=self._matrix(*layer.attention.inputs),
                output=self._matrix(layer.attention.output),
                **self._mlp(layer.mlp),
                before_attention=self._norm(layer.before_attention),
                after_attention=self._norm(layer.after_attention),
                before_mlp=self._norm(layer.before_mlp),
                after_mlp=self._norm(layer.after_mlp),
                query_norm=self._norm(layer.query_norm),
                key_norm=self._norm(layer.key_norm),
                cosines=cosines,
                sines=sines,
                sinks=None if options.sinks is None else self._vector(options.sinks),
                # The C code keeps keys as [size, block size] and values as [block size, size] in each block.
                keys=self._cache.keys[index].data_ptr(),
                values=self._cache.values[index].data_ptr(),
                pairs=0 if turns is None else turns.cosines.shape[1],
                alternating=turns is not None and turns.alternating,
                whole_norms=layer.whole_norms,
                window=seen.window.size if seen.window is not None else 0,
                group=seen.shape.group,
                scaling=options.scaling,
                softcap=options.softcap or 0.0,
            )

    def _mlp(self, mlp: Branch | Mixture) -> dict[str, Any]:
        """The fields of a layer that describe its MLP or its experts."""
        if isinstance(mlp, Branch):
            gate_up = self._matrix(*mlp.inputs)
            return {"gate_up": gate_up, "down": self._matrix(mlp.output), "gate": _gate(self._structure.gate)}
        routing, shared = mlp.routing, {} if mlp.shared is None else self._mlp(mlp.shared)
        scores = [routing.router, *([] if mlp.shared_score is None else [mlp.shared_score])]
        maps = [mlp.maps(expert) for expert in range(mlp.count)]
        fields = {
            name: (library.Matrix * mlp.count)(*(self._packed(pair[place]) for pair in maps))
            for place, name in enumerate(("experts_gate_up", "experts_down"))
        }
        self._kept += fields.values()
        for name, _ in list(mlp.experts.named_parameters()):
            setattr(mlp.experts, name, nn.Parameter(torch.empty(0), requires_grad=False))
        return {
            **fields,
            **shared,
            "router": self._matrix(*scores),
            "gates_shared": len(scores) - 1,
            "experts_gate": _gate(mlp.gate),
            "correction": None if routing.correction is None else self._vector(routing.correction),
            "num_experts": mlp.count,
            "num_chosen": routing.chosen,
            "num_groups": routing.groups,
            "groups_chosen": routing.groups_chosen,
            "sigmoid": routing.sigmoid,
            "shares_of_chosen": routing.shares_of_chosen,
            "routed_scale": routing.scale,
        }

    def _table(self, turns: Turns | None) -> tuple[int, int] | tuple[None, None]:
        """The addresses of cosines and sines; layers that rotate by the same ones share them."""
        if turns is None:
            return None, None
        if id(turns) not in self._tables:
            self._tables[id(turns)] = self._vector(turns.cosines), self._vector(turns.sines)
        return self._tables[id(turns)]

    def _norm(self, norm: Any) -> int | None:
        return None if norm is None else self._vector(gain(norm))

    def _vector(self, values: torch.Tensor) -> int:
        """The address of the values as floats, which are kept alive there."""
        floats = values.detach().float().contiguous()
        self._kept.append(floats)
        return int(floats.data_ptr())

    def _matrix(self, *maps: Any) -> library.Matrix:
        """Several linear maps of the same input as one, or an embedding; their weights are freed."""
        (_, columns), bias = shape_of(maps[0]), None
        biases = [getattr(one, "bias", None) for one in maps]
        if any(own is not None for own in biases):
            every = [torch.zeros(shape_of(x)[0]) if own is None else own for x, own in zip(maps, biases, strict=True)]
            bias = self._vector(torch.cat([whole(own) for own in every]))
        return self._joined(list(chain.from_iterable(self._panels(one) for one in maps)), bias, columns)

    def _packed(self, expert: Map) -> library.Matrix:
        """The map of one expert, whose weights are freed with those of the others; blocks are in panels already."""
        weight, bias = expert.weight, None if expert.bias is None else self._vector(expert.bias)
        if isinstance(weight, PanelProduct):
            return self._joined(self._addresses(weight.panels), bias, weight.columns)
        return self._joined(self._addresses(pack_floats(weight)), bias, weight.shape[1])

    def _joined(self, panels: list[tuple[int, int]], bias: int | None, columns: int) -> library.Matrix:
        addresses = (ctypes.c_void_p * len(panels))(*(address for address, _ in panels))
        formats = (ctypes.c_uint8 * len(panels))(*(format for _, format in panels))
        self._kept += [addresses, formats]
        return library.Matrix(addresses, formats, bias, len(panels), columns)

    def _panels(self, module: Any) -> list[tuple[int, int]]:
        """The address and the format of each panel of a weight, which is freed."""
        if isinstance(module, PackedLinear):
            assert isinstance(module.product, PanelProduct)  # there is no other on a CPU
            packed = module.product.panels
        elif isinstance(module, PackedEmbedding):
            product: Any = module.as_product()
            packed = pack_floats(whole(module.weight.detach())) if product is None else product.panels
        else:
            packed = pack_floats(whole(module.weight.detach()))
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        return self._addresses(packed)

    def _addresses(self, packed: Panels) -> list[tuple[int, int]]:
        self._kept.append(packed.data)
        start, size = packed.data.data_ptr(), packed.data.shape[1]
        return [(start + row * size, int(packed.format)) for row in range(len(packed.data))]


def _gate(gate: Gate) -> library.Gate:
    return library.Gate(ACTIVATIONS[gate.activation], gate.alternating, gate.steepness, gate.limit)
