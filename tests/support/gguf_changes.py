"""What llama.cpp's converter does to the weights of a model of transformers (``conversion/*.py``), for each family.

Each function yields what becomes of one weight: names of checkpoints, or names of the file as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import pi
from typing import Any

import torch
from support.gguf_converter import interleaved

Changed = Iterable[tuple[str, torch.Tensor]]
Change = Callable[[str, torch.Tensor, Any], Changed]


def unchanged(name: str, weight: torch.Tensor, _config: Any) -> Changed:
    yield name, weight


def permuted(name: str, weight: torch.Tensor, config: Any) -> Changed:
    """Queries and keys for a rotation of neighbours, experts in parts."""
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if name.endswith((f"{part}.weight", f"{part}.bias")):
            weight = interleaved(weight, heads)
    yield from experts(name, weight, config)


def experts(name: str, weight: torch.Tensor, _config: Any) -> Changed:
    """Gates and ups of experts in two tensors."""
    if name.endswith("experts.gate_up_proj"):
        place = name.removesuffix("gate_up_proj")
        yield from zip((f"{place}gate_proj.weight", f"{place}up_proj.weight"), weight.chunk(2, dim=1), strict=True)
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", weight
    else:
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), weight


def one_added(name: str, weight: torch.Tensor, _config: Any) -> Changed:
    yield name, weight + 1 if name.endswith("norm.weight") else weight


def gpt_oss(name: str, weight: torch.Tensor, _config: Any) -> Changed:
    place, _, own = name.rpartition(".")
    if own == "sinks":
        yield f"{name}.weight", weight
    elif own in ("gate_up_proj", "gate_up_proj_bias"):
        rows = weight.transpose(1, 2) if own == "gate_up_proj" else weight
        kind = "weight" if own == "gate_up_proj" else "bias"
        yield f"{place}.gate_proj.{kind}", rows[:, ::2]
        yield f"{place}.up_proj.{kind}", rows[:, 1::2]
    elif own in ("down_proj", "down_proj_bias") and weight.ndim > 1:
        down = own == "down_proj"
        yield f"{place}.down_proj.{'weight' if down else 'bias'}", weight.transpose(1, 2) if down else weight
    else:
        yield name, weight


def granitemoe(name: str, weight: torch.Tensor, config: Any) -> Changed:
    if name.endswith("router.weight"):
        yield name.replace("router", "router.layer"), weight
    elif ".block_sparse_moe.experts." in name:
        yield from experts(name.replace("block_sparse_moe", "mlp"), weight, config)
    elif name.endswith("shared_mlp.input_linear.weight"):
        gate, up = weight.chunk(2)
        layer = name.split(".")[2]
        yield f"blk.{layer}.ffn_gate_shexp.weight", gate
        yield f"blk.{layer}.ffn_up_shexp.weight", up
    else:
        yield from permuted(name, weight, config)


def falcon(name: str, weight: torch.Tensor, config: Any) -> Changed:
    if "query_key_value" in name:
        heads, groups = config.num_attention_heads, config.num_kv_heads if config.new_decoder_architecture else 1
        size = config.hidden_size // heads
        grouped = weight.view(groups, heads // groups + 2, size, config.hidden_size)
        parts = (grouped[:, :-2], grouped[:, [-2]], grouped[:, [-1]])
        weight = torch.cat([part.reshape(-1, config.hidden_size) for part in parts])
    yield name, weight


def deepseek2(name: str, weight: torch.Tensor, config: Any) -> Changed:
    if not name.endswith("kv_b_proj.weight"):
        yield from experts(name, weight, config)
        return
    nope, values = config.qk_nope_head_dim, config.v_head_dim
    keys, rest = weight.view(-1, nope + values, weight.shape[-1]).split([nope, values], dim=1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), rest


def head_sizes(config: Any) -> list[int]:
    """Of the heads in layers with a window, and in those without."""
    kinds = ("sliding_attention", "full_attention")
    return [config.per_layer_config[config.layer_types.index(kind)].head_dim for kind in kinds]


def gemma4(name: str, weight: torch.Tensor, config: Any) -> Changed:
    if name.endswith("layer_scalar") or ".experts." in name:
        yield f"{name}.weight", weight
    elif name.endswith("router.scale"):
        yield f"blk.{name.split('.')[2]}.ffn_gate_inp.scale", weight
    elif name.endswith("per_expert_scale"):
        yield f"blk.{name.split('.')[2]}.ffn_down_exps.scale", weight
    else:
        yield name, weight
    if name == "model.norm.weight":
        size, rotated = head_sizes(config)[1], config.rope_parameters["full_attention"]["partial_rotary_factor"]
        used = int(size * rotated / 2)
        yield "rope_freqs.weight", torch.tensor([1.0] * used + [1e30] * (size // 2 - used))


def nemotron_h(name: str, weight: torch.Tensor, config: Any) -> Changed:
    name = name.replace("model.", "backbone.")
    if name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt.bias"), weight
    elif name.endswith("conv1d.weight"):
        yield name, weight.squeeze()
    elif name.endswith("A_log"):
        yield name, -weight.exp().reshape(-1, 1)
    elif name.endswith("mixer.D"):
        yield name, weight.reshape(-1, 1)
    elif name.endswith("mixer.norm.weight"):
        yield name, weight.reshape(config.n_groups, -1)
    elif ".experts." in name:
        yield f"{name.replace('backbone', 'model').replace('mixer', 'mlp')}.weight", weight
    else:
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), weight


def qwen35(name: str, weight: torch.Tensor, config: Any) -> Changed:
    """Norms with one added, and the heads of values in turn: the first of each key, then the second, and so on."""
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    fused = 2 * keys * config.linear_key_head_dim

    def tiled(values: torch.Tensor, rows: int) -> torch.Tensor:
        return values.reshape(keys, -1, rows, *values.shape[1:]).transpose(0, 1).reshape(values.shape)

    if name.endswith("norm.weight") and "linear_attn" not in name:
        weight = weight + 1
    elif name.endswith("A_log"):
        weight = tiled(-weight.exp(), 1)
    elif name.endswith("dt_bias"):
        name, weight = name.replace("dt_bias", "dt_proj.bias"), tiled(weight, 1)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        weight = tiled(weight, 1)
    elif name.endswith("in_proj_z.weight"):
        weight = tiled(weight, size)
    elif name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        rows = weight.flatten(1)
        weight = torch.cat([rows[:fused], tiled(rows[fused:], size)])
    elif name.endswith("linear_attn.out_proj.weight"):
        weight = tiled(weight.T.contiguous(), size).T
    yield from experts(name, weight, config)


def lfm2(name: str, weight: torch.Tensor, _config: Any) -> Changed:
    yield name, weight.squeeze(1) if name.endswith("conv.conv.weight") else weight


def llama3_factors(name: str, weight: torch.Tensor, config: Any) -> Changed:
    """The factors of the frequencies beside the weights (``LlamaModel.generate_extra_tensors``)."""
    yield from permuted(name, weight, config)
    if name != "model.norm.weight":
        return
    told = config.rope_parameters
    low, high = (told["original_max_position_embeddings"] / told[f"{kind}_freq_factor"] for kind in ("low", "high"))
    factors = []
    for place in range(0, config.head_dim, 2):
        wave = 2 * pi * told["rope_theta"] ** (place / config.head_dim)
        smooth = (low / wave - 1) * told["low_freq_factor"] / (told["high_freq_factor"] - told["low_freq_factor"])
        between = 1 / ((1 - smooth) / told["factor"] + smooth)
        factors.append(1.0 if wave < high else told["factor"] if wave > low else between)
    yield "rope_freqs.weight", torch.tensor(factors)


def longrope(name: str, weight: torch.Tensor, config: Any) -> Changed:
    yield name, weight
    if name == "model.norm.weight" and config.rope_parameters["rope_type"] == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", torch.tensor(config.rope_parameters[f"{kind}_factor"])
