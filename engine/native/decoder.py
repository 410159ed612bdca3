"""Recognises models that the native forward can compute, and describes them to it.

Only the structure is checked here; that the results equal the model's own is shown by comparison (``verify.py``,
``build.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from engine.cache.kv_tensors import KVCache
from engine.cache.layout import KVShape
from engine.model.architecture import ATTENTION_PARTS, HEAD_NORMS, LAYER_PARTS, MLP_PARTS
from engine.model.probe import ProbedLayer
from engine.native import library
from engine.native.errors import NotNative
from engine.native.packing import PANEL, fits, pack_floats
from engine.native.products import PanelProduct
from engine.native.verify import Turns
from engine.packed.modules import PackedEmbedding, PackedLinear


@dataclass(slots=True)
class Decoder:
    """A model as the C code takes it, with everything that it points to."""

    model: library.Model
    vocab_size: int
    kept: list[object] = field(default_factory=list)


def require_known(module: Any, probed: list[ProbedLayer], cache: KVCache) -> None:
    """Raises ``NotNative`` for what the C code does not compute; nothing is changed."""
    config, body = module.config.get_text_config(), getattr(module, "model", None)
    if body is None or not all(hasattr(body, part) for part in ("layers", "norm", "rotary_emb")):
        raise NotNative(f"{type(module).__name__} is not built like Llama")
    if cache.dtype != torch.float32 or cache.device.type != "cpu":
        raise NotNative(f"it computes in {cache.dtype} on {cache.device}, not in float32 on a CPU")
    activation = getattr(config, "hidden_act", None)
    if activation != "silu":
        raise NotNative(f"its activation is {activation}, not silu")
    shapes = {layer.shape._replace(group=0) for layer in probed}
    if any(layer.window is not None and layer.window.chunked for layer in probed):
        raise NotNative("its layers attend in chunks")
    if not all(layer.writes for layer in probed):
        raise NotNative("some of its layers attend to the keys and values of others")
    if len(shapes) > 1 or any(s.key_size != s.value_size or s.key_size % PANEL for s in shapes):
        raise NotNative(f"its heads are not all of one size that is a multiple of {PANEL}")
    if cache.block_size % PANEL:
        raise NotNative(f"its blocks hold {cache.block_size} tokens, not a multiple of {PANEL}")
    if [layer.module for layer in probed] != [getattr(layer, "self_attn", None) for layer in body.layers]:
        raise NotNative("its attention does not run layer by layer")
    for layer in body.layers:
        _require_parts(layer, LAYER_PARTS)
        _require_parts(layer.self_attn, ATTENTION_PARTS, HEAD_NORMS)
        _require_parts(layer.mlp, MLP_PARTS)
    _require_sizes(module, config.hidden_size, probed[0].shape)


def require_one_rotation(original_context: int | None, max_context: int) -> None:
    """Raises ``NotNative`` where a text of ``max_context`` tokens is rotated otherwise than a short one (LongRoPE).

    The C code has one table of cosines and sines, by position; two would be a second look-up for every token.
    """
    if original_context and original_context < max_context:
        raise NotNative(
            f"beyond {original_context} tokens its texts are rotated by other factors (longrope), and the C code has "
            f"one table of angles; a max_context of {original_context} leaves it one"
        )


def _require_sizes(module: Any, hidden: int, shape: KVShape) -> None:
    """All layers must have the size of the first one: the C code has one set of buffers for all of them."""
    body, head, size = module.model, module.get_output_embeddings(), shape.key_size
    queries, inner = body.layers[0].self_attn.q_proj.out_features, body.layers[0].mlp.gate_proj.out_features
    keys, eps = shape.heads * size, getattr(body.norm, "variance_epsilon", None)
    if queries % keys:
        raise NotNative(f"its queries are {queries} numbers for {shape.heads} keys of {size}")
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _require_map(attention.q_proj, hidden, queries)
        _require_map(attention.k_proj, hidden, keys)
        _require_map(attention.v_proj, hidden, keys)
        _require_map(attention.o_proj, queries, hidden)
        _require_map(mlp.gate_proj, hidden, inner)
        _require_map(mlp.up_proj, hidden, inner)
        _require_map(mlp.down_proj, inner, hidden)
        if mlp.gate_proj.bias is not None or mlp.up_proj.bias is not None:
            raise NotNative("its gated MLP has biases")
        _require_norm(layer.input_layernorm, hidden, eps)
        _require_norm(layer.post_attention_layernorm, hidden, eps)
        for name, part in attention.named_children():
            if name in HEAD_NORMS:
                _require_norm(part, size, eps)
    _require_norm(body.norm, hidden, eps)
    _require_map(head, hidden, getattr(head, "out_features", None))


def _require_parts(module: nn.Module, parts: Set[str], optional: Set[str] = frozenset()) -> None:
    children = {name for name, _ in module.named_children()}
    if not parts <= children <= parts | optional:
        raise NotNative(f"{type(module).__name__} has the parts {sorted(children)}")


def _require_map(linear: Any, columns: int, channels: int | None) -> None:
    if type(linear) is not nn.Linear and not (isinstance(linear, PackedLinear) and linear.order is None):
        raise NotNative(f"{type(linear).__name__} is not a plain linear layer")
    found = linear.in_features, linear.out_features
    if found != (columns, channels):
        raise NotNative(f"a linear layer maps {found[0]} to {found[1]} numbers; {columns} to {channels} are expected")
    if not fits(linear.out_features, linear.in_features):
        raise NotNative(f"a linear layer of {found[0]} to {found[1]} does not divide into whole panels and groups")


def _require_norm(norm: Any, size: int, eps: object) -> None:
    """The C code divides by the root mean square, with one epsilon for all, and multiplies by weights."""
    weights = {name: weight.numel() for name, weight in norm.named_parameters()}
    if weights != {"weight": size} or not isinstance(eps, float) or getattr(norm, "variance_epsilon", None) != eps:
        raise NotNative(f"{type(norm).__name__} is not a norm of {size} weights with the epsilon {eps} of all norms")


def describe(module: Any, probed: list[ProbedLayer], cache: KVCache, turns: Turns) -> Decoder:
    """Pack the weights of a supported model. Each weight of ``module`` is freed once it is packed, so that the memory
    never has to hold both copies of the model; only the embedding stays whole."""
    return _Description(module, cache, turns).make(probed)


class _Description:
    def __init__(self, module: Any, cache: KVCache, turns: Turns) -> None:
        self._module = module
        self._config = module.config.get_text_config()
        self._cache = cache
        self._turns = turns
        self._embedding = module.get_input_embeddings()
        self._kept: list[object] = [cache]

    def make(self, probed: list[ProbedLayer]) -> Decoder:
        body, head = self._module.model, self._module.get_output_embeddings()
        attention, shape = body.layers[0].self_attn, probed[0].shape
        cosines, sines = self._turns
        sizes = {
            "num_layers": len(probed),
            "hidden": self._config.hidden_size,
            "intermediate": body.layers[0].mlp.gate_proj.out_features,
            "heads": attention.q_proj.out_features // shape.key_size,
            "kv_heads": shape.heads,
            "size": shape.key_size,
            "rotary": cosines.shape[1],
            "block_size": self._cache.block_size,
            "max_context": len(cosines),
        }
        layers = (library.Layer * len(probed))(*self._layers(body.layers, probed))
        self._kept.append(layers)
        model = library.Model(
            layers=layers,
            head=self._matrix([head]),
            norm=self._vector(body.norm.weight),
            cosines=self._vector(cosines),
            sines=self._vector(sines),
            eps=body.norm.variance_epsilon,
            scaling=attention.scaling,
            **sizes,
        )
        return Decoder(model, head.out_features, self._kept)

    def _layers(self, modules: Any, probed: list[ProbedLayer]) -> Iterator[library.Layer]:
        for index, (layer, seen) in enumerate(zip(modules, probed, strict=True)):
            attention, mlp = layer.self_attn, layer.mlp
            norms = {name: getattr(attention, name, None) for name in HEAD_NORMS}
            yield library.Layer(
                qkv=self._matrix([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=self._matrix([attention.o_proj]),
                gate_up=self._matrix([mlp.gate_proj, mlp.up_proj], interleaved=True),
                down=self._matrix([mlp.down_proj]),
                attention_norm=self._vector(layer.input_layernorm.weight),
                mlp_norm=self._vector(layer.post_attention_layernorm.weight),
                query_norm=self._vector(norms["q_norm"].weight) if norms["q_norm"] else None,
                key_norm=self._vector(norms["k_norm"].weight) if norms["k_norm"] else None,
                keys=self._cache.keys[index].data_ptr(),
                values=self._cache.values[index].data_ptr(),
                window=seen.window.size if seen.window is not None else 0,
                group=seen.shape.group,
            )

    def _vector(self, values: torch.Tensor) -> int:
        """The address of the values as floats, which are kept alive there."""
        floats = values.detach().float().contiguous()
        self._kept.append(floats)
        return int(floats.data_ptr())

    def _matrix(self, linears: list[Any], *, interleaved: bool = False) -> library.Matrix:
        """Several linear maps of the same input as one; with ``interleaved``, their panels alternate."""
        columns = linears[0].in_features
        bias = None
        if any(linear.bias is not None for linear in linears):
            zeros = [torch.zeros(linear.out_features) for linear in linears]
            bias = self._vector(
                torch.cat([zero if x.bias is None else x.bias for x, zero in zip(linears, zeros, strict=True)])
            )
        each = [self._panels(linear) for linear in linears]
        panels = list(chain.from_iterable(zip(*each, strict=True))) if interleaved else list(chain(*each))
        addresses = (ctypes.c_void_p * len(panels))(*(address for address, _ in panels))
        formats = (ctypes.c_uint8 * len(panels))(*(format for _, format in panels))
        self._kept += [addresses, formats]
        return library.Matrix(addresses, formats, bias, len(panels), columns)

    def _panels(self, linear: Any) -> list[tuple[int, int]]:
        """The address and the format of each panel of a linear map, whose weight is freed."""
        if isinstance(linear, PackedLinear):
            assert isinstance(linear.product, PanelProduct)  # there is no other on a CPU
            packed = linear.product.panels
        else:
            packed = pack_floats(linear.weight)
            if isinstance(self._embedding, PackedEmbedding) or linear.weight is not self._embedding.weight:
                linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self._kept.append(packed.data)
        start, size = packed.data.data_ptr(), packed.data.shape[1]
        return [(start + row * size, int(packed.format)) for row in range(len(packed.data))]
