"""The parts of a decoder that the native forward computes, found in transformers' modules by their names.

Names only say where to look; that the parts compute what is described here is shown by comparison (``verify.py``,
``build.py``). Nothing is read but structure and sizes, so that a model without weights will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.model.architecture import (
    ATTENTION,
    HEAD_NORMS,
    LAYER_NORMS,
    MLP,
    RESIDUAL_SCALE,
)
from engine.model.probe import ProbedLayer
from engine.native.errors import NotNative
from engine.native.mixtures import (
    ACTIVATIONS,
    Branch,
    Gate,
    Mixture,
    parts_of,
    read_branch,
    read_mixture,
    read_mlp,
)
from engine.native.packing import GROUP, PANEL
from engine.packed.modules import is_plain_linear, shape_of

NORMS = (*LAYER_NORMS, (None, "post_attention_layernorm", None, "post_feedforward_layernorm"))
PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")
QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
OUTPUT = "o_proj"
MLPS, BESIDE = (MLP, "block_sparse_moe"), "shared_mlp"
"""What layers call their MLP or mixture, and one that all tokens see beside a mixture."""
LOOKUP_SCALE = "scalar_embed_scale"
"""The attribute of an embedding that multiplies what it looks up."""
VECTOR_SCALE, LOGIT_DIVISOR, LOGIT_CAP = "embedding_multiplier", "logits_scaling", "final_logit_softcapping"
"""Numbers of a configuration that bear upon the first states and upon the logits."""


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """Norms are before and after attention and MLP, and of queries and keys; None: there is none.

    ``whole_norms`` take all heads of a token for one vector.
    """

    attention: Branch
    mlp: Branch | Mixture
    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any
    query_norm: Any
    key_norm: Any
    whole_norms: bool


@dataclass(frozen=True, slots=True)
class Structure:
    """A decoder whose layers have the same heads, with what it multiplies numbers by.

    ``lookup_scale`` is that of embeddings, ``vector_scale`` that of all first states, also of given vectors.
    """

    layers: tuple[LayerStructure, ...]
    embedding: Any
    norm: Any
    head: Any
    gate: Gate
    hidden: int
    heads: int
    kv_heads: int
    size: int
    eps: float
    lookup_scale: float
    vector_scale: float
    branch_scale: float
    logit_scale: float
    logit_cap: float | None

    @property
    def widths(self) -> tuple[int, int, int]:
        """How many numbers the queries, keys and values of a token are."""
        return self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size


def read_structure(module: Any, probed: list[ProbedLayer]) -> Structure:
    """Raises ``NotNative`` for parts that the C code does not compute."""
    config, body = module.config.get_text_config(), text_body(module)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise NotNative(f"its activation is {activation}, which the C code does not compute")
    if [layer.module for layer in probed] != [getattr(layer, ATTENTION, None) for layer in body.layers]:
        raise NotNative("its attention does not run layer by layer")
    hidden = config.hidden_size
    layers = tuple(_layer(layer, probed[0].shape.key_size, hidden, activation) for layer in body.layers)
    first, shape, embedding = layers[0], probed[0].shape, module.get_input_embeddings()
    queries = first.attention.inner
    if queries % (shape.heads * shape.key_size):
        raise NotNative(f"its queries are {queries} numbers for {shape.heads} keys of {shape.key_size}")
    scales = {float(getattr(layer, RESIDUAL_SCALE, 1.0)) for layer in body.layers}
    if len(scales) > 1:
        raise NotNative("its layers scale what they add differently")
    structure = Structure(
        layers=layers,
        embedding=embedding,
        norm=body.norm,
        head=module.get_output_embeddings(),
        gate=Gate(activation),
        hidden=hidden,
        heads=queries // shape.key_size,
        kv_heads=shape.heads,
        size=shape.key_size,
        eps=epsilon(body.norm),
        lookup_scale=float(getattr(embedding, LOOKUP_SCALE, 1.0)),
        vector_scale=float(getattr(config, VECTOR_SCALE, None) or 1.0),
        branch_scale=scales.pop(),
        logit_scale=1.0 / float(getattr(config, LOGIT_DIVISOR, None) or 1.0),
        logit_cap=getattr(config, LOGIT_CAP, None),
    )
    _require_sizes(structure)
    return structure


def text_body(module: Any) -> Any:
    """The module that holds the layers: that of a text model, or of the text part of one that has towers."""
    outer = getattr(module, "model", None)
    for body in (outer, getattr(outer, "language_model", None)):
        if all(hasattr(body, part) for part in ("layers", "norm", "rotary_emb")):
            return body
    raise NotNative(f"{type(module).__name__} is not built like Llama")


def epsilon(norm: Any) -> float:
    """What an RMS norm adds to the mean square. Raises ``NotNative`` for a module that has no such number."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(found, float):
        raise NotNative(f"{type(norm).__name__} is not an RMS norm")
    return found


def _layer(layer: Any, size: int, hidden: int, activation: str) -> LayerStructure:
    found, attention = parts_of(layer), getattr(layer, ATTENTION)
    mlp, beside = next((getattr(layer, name) for name in MLPS if name in found), None), getattr(layer, BESIDE, None)
    names = next((names for names in NORMS if found - {*MLPS, BESIDE} == {ATTENTION, *names} - {None}), None)
    if names is None or mlp is None:
        raise NotNative(f"{type(layer).__name__} has the parts {sorted(found)}")
    norms = {place: name and getattr(layer, name) for place, name in zip(PLACES, names, strict=True)}
    head_norms = {"query_norm": getattr(attention, "q_norm", None), "key_norm": getattr(attention, "k_norm", None)}
    weights = [getattr(norm, "weight", None) for norm in head_norms.values()]
    return LayerStructure(
        attention=read_branch(attention, QUERY_KEY_VALUE, OUTPUT, HEAD_NORMS),
        mlp=read_mixture(mlp, beside, hidden, activation) or read_mlp(mlp),
        **norms,
        **head_norms,
        whole_norms=any(weight is not None and weight.numel() > size for weight in weights),
    )


def _require_sizes(structure: Structure) -> None:
    """All layers must have the heads of the first one; MLPs may be of any width."""
    queries, keys, values = structure.widths
    hidden = structure.hidden
    for layer in structure.layers:
        _require_maps(layer.attention.inputs, hidden, (queries, keys, values))
        _require_maps((layer.attention.output,), queries, (hidden,))
        mlp = layer.mlp if isinstance(layer.mlp, Branch) else layer.mlp.shared
        if mlp is not None:
            _require_maps(mlp.inputs, hidden, (mlp.inner, mlp.inner))
            _require_maps((mlp.output,), mlp.inner, (hidden,))
        if isinstance(layer.mlp, Mixture) and layer.mlp.shared_score is not None:
            _require_linear(layer.mlp.shared_score, hidden)
        for norm in (layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp):
            _require_norm(norm, hidden, structure.eps)
        for norm, width in ((layer.query_norm, queries), (layer.key_norm, keys)):
            _require_norm(norm, width if layer.whole_norms else structure.size, structure.eps)
    _require_norm(structure.norm, hidden, structure.eps)
    _require_linear(structure.head, hidden)
    others = {name for name, _ in structure.embedding.named_parameters()} - {"weight"}
    if not isinstance(structure.embedding, nn.Embedding) or others or shape_of(structure.embedding)[1] != hidden:
        raise NotNative(f"{type(structure.embedding).__name__} is not an embedding of {hidden} numbers a token")


def _require_maps(linears: tuple[Any, ...], columns: int, channels: tuple[int, ...]) -> None:
    """Linear layers that map ``columns`` numbers to so many each, or one that maps them to all of these."""
    expected = channels if len(linears) == len(channels) else (sum(channels),)
    for linear, count in zip(linears, expected, strict=True):
        _require_linear(linear, columns)
        if linear.out_features != count:
            raise NotNative(
                f"a linear layer maps {columns} to {linear.out_features} numbers; {columns} to {count} are expected"
            )
        if count % PANEL:
            raise NotNative(f"a linear layer of {columns} to {count} numbers does not divide into whole panels")


def _require_linear(linear: Any, columns: int) -> None:
    if not is_plain_linear(linear):
        raise NotNative(f"{type(linear).__name__} is not a plain linear layer")
    if linear.in_features != columns:
        raise NotNative(f"a linear layer maps {linear.in_features} numbers; {columns} are expected")
    if columns % GROUP:
        raise NotNative(f"a linear layer of {columns} numbers does not divide into whole groups")


def _require_norm(norm: Any, size: int, eps: float) -> None:
    """The C code divides by the root mean square, with one epsilon for all, and multiplies by weights."""
    if norm is None:
        return
    weights = {name: weight.numel() for name, weight in norm.named_parameters()}
    if weights != {"weight": size} or epsilon(norm) != eps:
        raise NotNative(f"{type(norm).__name__} is not a norm of {size} weights with the epsilon {eps} of all norms")
