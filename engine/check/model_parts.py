"""The parts of a model, by the names that configurations have for them: experts, and towers for images and sound."""

from __future__ import annotations

from math import prod
from typing import Any

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "num_experts_per_token")
_TOWERS = (
    ("image", ("vision_config", "vision_tower_config", "image_token_id", "image_token_index")),
    ("audio", ("audio_config", "speech_config", "audio_token_id", "audio_token_index")),
    ("video", ("video_config", "video_token_id", "video_token_index")),
)


def inputs_of(config: Any) -> tuple[str, ...]:
    """What a model's class takes in, text first, as far as its configuration names a tower or a token for it."""
    found = (kind for kind, names in _TOWERS if any(getattr(config, name, None) is not None for name in names))
    return ("text", *found)


def active_parameters(model: Any, text: Any) -> int | None:
    """How many weights one token uses in a mixture of experts; None for other models, and where it is not known.

    The experts that are routed to are the weights in a module named ``experts``: a list of modules, or tensors whose
    first dimension counts the experts.
    """
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int) and n > 1), None)
    chosen = next((k for name in _CHOSEN if isinstance(k := getattr(text, name, None), int) and k > 0), None)
    if experts is None or chosen is None or chosen > experts:
        return None
    routed = total = 0
    for name, weight in model.named_parameters():
        size = prod(weight.shape)
        total += size
        _, inside, rest = name.rpartition(".experts.")
        if inside and (rest.partition(".")[0].isdigit() or weight.shape[0] == experts):
            routed += size
    return total - routed + routed * chosen // experts if routed else None
