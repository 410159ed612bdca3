"""Recognises models that the native forward can compute, and describes them to it.

Only the structure is looked at here; whether the numbers are the model's own is shown by comparison (``runner.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from engine.attention.probe import ProbedLayer
from engine.kv import KVCache
from engine.native import library
from engine.native.errors import NotNative
from engine.native.packing import LANES, fits, pack_blocks, pack_floats

Blocks = Mapping[str, tuple[torch.Tensor, str]]
"""Blocks of a GGUF file by the name of the weight that they make: bytes [channels, groups, bytes] and their type."""

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(slots=True)
class Decoder:
    """A model as the C code takes it, with everything that it points to."""

    model: library.Model
    vocab_size: int
    kept: list[object] = field(default_factory=list)


def describe(module: Any, layers: list[ProbedLayer], cache: KVCache, max_context: int, blocks: Blocks) -> Decoder:
    """Lay out the weights of ``module`` anew. Raises ``NotNative`` for what the C code does not compute."""
    return _Description(module, cache, max_context, blocks).make(layers)


class _Description:
    def __init__(self, module: Any, cache: KVCache, max_context: int, blocks: Blocks) -> None:
        self._module = module
        self._config = module.config.get_text_config()
        self._cache = cache
        self._max_context = max_context
        self._blocks = blocks
        self._names = {id(weight): name for name, weight in module.named_parameters()}
        self._kept: list[object] = [cache]

    def make(self, probed: list[ProbedLayer]) -> Decoder:
        body = getattr(self._module, "model", None)
        head = self._module.get_output_embeddings()
        if body is None or head is None or not all(hasattr(body, part) for part in ("layers", "norm", "rotary_emb")):
            raise NotNative(f"{type(self._module).__name__} is not built like Llama")
        self._require_supported(probed)
        layers = (library.Layer * len(probed))(*self._layers(body.layers, probed))
        self._kept.append(layers)
        attention, shape = body.layers[0].self_attn, probed[0].shape
        cosines, sines = self._rotary(body.rotary_emb)
        model = library.Model(
            layers=layers,
            head=self._matrix([head]),
            norm=self._vector(body.norm.weight),
            cosines=self._vector(cosines),
            sines=self._vector(sines),
            num_layers=len(probed),
            hidden=self._config.hidden_size,
            intermediate=body.layers[0].mlp.gate_proj.out_features,
            heads=attention.q_proj.out_features // shape.key_size,
            kv_heads=shape.heads,
            size=shape.key_size,
            rotary=cosines.shape[1],
            block_size=self._cache.block_size,
            max_context=self._max_context,
            eps=body.norm.variance_epsilon,
            scaling=attention.scaling,
        )
        self._kept.append(model)
        return Decoder(model, head.out_features, self._kept)

    def _require_supported(self, probed: list[ProbedLayer]) -> None:
        if self._cache.dtype != torch.float32 or self._cache.device.type != "cpu":
            raise NotNative(f"it computes in {self._cache.dtype} on {self._cache.device}, not in float32 on a CPU")
        activation = getattr(self._config, "hidden_act", None)
        if activation != "silu":
            raise NotNative(f"its activation is {activation}, not silu")
        shapes = {layer.shape for layer in probed}
        if len(shapes) > 1 or any(s.key_size != s.value_size or s.key_size % LANES for s in shapes):
            raise NotNative(f"its heads are not all of one size that is a multiple of {LANES}")
        if self._cache.block_size % LANES:
            raise NotNative(f"its blocks hold {self._cache.block_size} tokens, not a multiple of {LANES}")

    def _layers(self, modules: Any, probed: list[ProbedLayer]) -> Iterator[library.Layer]:
        for index, (layer, seen) in enumerate(zip(modules, probed, strict=True)):
            attention, mlp = layer.self_attn, layer.mlp
            _require_parts(layer, LAYER_PARTS)
            _require_parts(attention, ATTENTION_PARTS, HEAD_NORMS)
            _require_parts(mlp, MLP_PARTS)
            yield library.Layer(
                qkv=self._matrix([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=self._matrix([attention.o_proj]),
                gate_up=self._matrix([mlp.gate_proj, mlp.up_proj], interleaved=True),
                down=self._matrix([mlp.down_proj]),
                attention_norm=self._vector(layer.input_layernorm.weight),
                mlp_norm=self._vector(layer.post_attention_layernorm.weight),
                query_norm=self._head_norm(attention, "q_norm", seen),
                key_norm=self._head_norm(attention, "k_norm", seen),
                keys=self._cache.keys[index].data_ptr(),
                values=self._cache.values[index].data_ptr(),
                window=seen.sliding_window or 0,
            )

    def _head_norm(self, attention: Any, name: str, seen: ProbedLayer) -> int | None:
        norm = getattr(attention, name, None)
        if norm is None:
            return None
        if norm.weight.numel() != seen.shape.key_size:
            raise NotNative(f"{seen.name}.{name} spans more than one head")
        return self._vector(norm.weight)

    def _rotary(self, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cosines and sines of all positions, [positions, rotated numbers] each."""
        positions = torch.arange(self._max_context)[None]
        with torch.inference_mode():
            tables = rotary(torch.zeros(1, 1, self._config.hidden_size), positions)
        if not isinstance(tables, tuple) or any(table.dim() != 3 for table in tables):
            raise NotNative("its rotary embedding is not one table of cosines and one of sines")
        cosines, sines = tables
        return cosines[0], sines[0]

    def _vector(self, values: torch.Tensor) -> int:
        """The address of numbers that stay where they are."""
        floats = values.detach().float().contiguous()
        self._kept.append(floats)
        return int(floats.data_ptr())

    def _matrix(self, linears: list[Any], *, interleaved: bool = False) -> library.Matrix:
        """Several linear maps of the same input as one; interleaved, their panels take turns."""
        if interleaved and any(linear.bias is not None for linear in linears):
            raise NotNative("its gated MLP has biases")
        if len({linear.out_features for linear in linears}) > 1 and interleaved:
            raise NotNative("the two halves of its gated MLP differ in size")
        each = [self._panels(linear) for linear in linears]
        panels = list(chain.from_iterable(zip(*each, strict=True))) if interleaved else list(chain(*each))
        addresses = (ctypes.c_void_p * len(panels))(*(address for address, _ in panels))
        formats = (ctypes.c_uint8 * len(panels))(*(format for _, format in panels))
        self._kept += [addresses, formats]
        biases = [linear.bias for linear in linears]
        bias = None
        if any(part is not None for part in biases):
            parts = [
                linear.weight.new_zeros(linear.out_features) if b is None else b
                for linear, b in zip(linears, biases, strict=True)
            ]
            bias = self._vector(torch.cat(parts))
        return library.Matrix(addresses, formats, bias, len(panels), linears[0].in_features)

    def _panels(self, linear: Any) -> list[tuple[int, int]]:
        """The address and the format of each panel of a linear map."""
        if type(linear) is not nn.Linear:
            raise NotNative(f"{type(linear).__name__} is not a plain linear map")
        name = self._names[id(linear.weight)]
        if not fits(linear.out_features, linear.in_features):
            raise NotNative(f"{name} is {linear.out_features} x {linear.in_features}, not in whole panels and groups")
        packed = pack_blocks(*self._blocks[name]) if name in self._blocks else pack_floats(linear.weight)
        self._kept.append(packed.data)
        start, size = packed.data.data_ptr(), packed.data.shape[1]
        return [(start + row * size, int(packed.format)) for row in range(len(packed.data))]


def _require_parts(module: nn.Module, parts: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    children = {name for name, _ in module.named_children()}
    if not parts <= children <= parts | optional:
        raise NotNative(f"{type(module).__name__} has the parts {sorted(children)}")
