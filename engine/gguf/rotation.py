"""How the positions of a GGUF file's model are rotated, in the words of transformers.

llama.cpp's converter writes either the parameters of a scaling (linear, yarn, longrope), or, for the scaling of Llama
3, the factors that it makes of each frequency: a tensor ``rope_freqs.weight``. Factors are taken only where a known
formula gives the same ones, so that what transformers computes is what the file holds.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.gguf.fields import Fields
from engine.gguf.header import Unreadable
from engine.gguf.weights import numbers_of

# As published with Llama 3.1, 3.2 and 3.3, and their kin: factor, then the rest.
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0)
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rotation(fields: Fields, size: int, theta: float = 10000.0) -> dict[str, Any]:
    """The ``rope_parameters`` of a model whose heads have ``size`` numbers."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base", theta)}
    rotated = fields.count("rope.dimension_count", size) or size
    if rotated != size:
        found["partial_rotary_factor"] = rotated / size
    if "rope_freqs.weight" in fields.header.tensors and fields.header.architecture != "gemma4":
        return found | _llama3(fields, rotated, found["rope_theta"])
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none" and "rope_factors_long.weight" in fields.header.tensors:
        kind = "longrope"  # Phi 3 says it by its tensors alone
    factor = fields.real("rope.scaling.factor", fields.real("rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return found
    if kind in ("none", "linear"):
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return found | _yarn(fields, factor)
    if kind == "longrope":
        return found | _longrope(fields, factor)
    raise Unreadable(f"its rotary scaling {kind!r} is not known; known are none, linear, yarn and longrope")


def _yarn(fields: Fields, factor: float) -> dict[str, Any]:
    if fields.real("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise Unreadable("its rope.scaling.yarn_ext_factor is not 1, which transformers' yarn cannot be told")
    scale = fields.real("rope.scaling.yarn_attn_factor", fields.real("rope.scaling.attn_factor", None))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.count("rope.scaling.original_context_length"),
        "beta_fast": fields.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.real("rope.scaling.yarn_beta_slow", 1.0),
        **({} if scale is None else {"attention_factor": scale}),
        **_mscale(fields),
    }


def _mscale(fields: Fields) -> dict[str, Any]:
    """How much the scores grow with the factor. Of two published parameters, which are alike in all models, the header
    has one: ``mscale_all_dim``, of DeepSeek's models a tenth of it (llama.cpp, TAG_DEEPSEEK2_YARN_LOG_MUL_FIX)."""
    told = fields.real("rope.scaling.yarn_log_multiplier", 0.0)
    if not told:
        return {}
    if fields.header.architecture == "deepseek2":
        told = round(10 * told, 6)
    return {"mscale": told, "mscale_all_dim": told}


UNROTATED = 1e29
"""By no less than this llama.cpp's converter divides the frequencies of numbers that are not rotated."""


def proportional(fields: Fields, size: int) -> dict[str, Any]:
    """Of Gemma 4's layers with full attention: the first part of the frequencies is used, the rest is nothing."""
    tensor = fields.header.tensors.get("rope_freqs.weight")
    if tensor is None:
        raise Unreadable("it has no rope_freqs.weight, which says what part of a head Gemma 4 rotates")
    held = numbers_of(tensor)
    used = int((held == 1.0).sum())
    if len(held) != size // 2 or not bool((held[:used] == 1.0).all() and (held[used:] >= UNROTATED).all()):
        raise Unreadable("its rope_freqs.weight are not those of a head that is rotated in part, as Gemma 4's are")
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": used / len(held),
        "rope_theta": fields.real("rope.freq_base", 1000000.0),
    }


def _longrope(fields: Fields, factor: float) -> dict[str, Any]:
    """Short and long factors are tensors of the file, as transformers wants them: lists."""
    tensors = fields.header.tensors
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    if missing := [name for name in names.values() if name not in tensors]:
        raise Unreadable(f"its rotary scaling is longrope, and it has no tensor {missing[0]}")
    found = {key: numbers_of(tensors[name]).tolist() for key, name in names.items()}
    more = {"factor": factor} if factor != 1.0 else {}
    scale = fields.real("rope.scaling.attn_factor", None)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": fields.count("rope.scaling.original_context_length"),
        **({"attention_factor": scale} if scale is not None else {}),
        **more,
        **found,
    }


def _llama3(fields: Fields, rotated: int, theta: float) -> dict[str, Any]:
    """The parameters that give the factors of the file. Raises ``Unreadable`` where no known ones do."""
    held = numbers_of(fields.header.tensors["rope_freqs.weight"])
    for factor in _LLAMA3_FACTORS:
        told: dict[str, Any] = {"factor": factor, **_LLAMA3}
        expected = llama3_factors(rotated, theta, **told)
        if held.shape == expected.shape and torch.allclose(held, expected, rtol=1e-4):
            return {"rope_type": "llama3", **told}
    raise Unreadable(
        "its rope_freqs.weight are not the factors of Llama 3's rotary scaling; use the model's safetensors folder"
    )


def llama3_factors(
    size: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """By what each frequency is divided, [size / 2]: Llama 3.1's published code, and llama.cpp's converter."""
    original = original_max_position_embeddings
    longest, shortest = original / low_freq_factor, original / high_freq_factor
    factors = []
    for place in range(0, size, 2):
        length = 2 * math.pi * theta ** (place / size)
        if length < shortest:
            factors.append(1.0)
        elif length > longest:
            factors.append(factor)
        else:
            smooth = (original / length - low_freq_factor) / (high_freq_factor - low_freq_factor)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)
