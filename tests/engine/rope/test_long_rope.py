"""The rotary modules of transformers over a step of short and long texts, and what cannot rotate them side by side."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.api.errors import ModelRefused
from engine.rope import long_rope
from engine.rope.long_rope import LongRope, rotate_by_text

ORIGINAL, LONGEST = 16, 64
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [3.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
    "attention_factor": 1.25,
}
SCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
AXES = {"mrope_section": [2, 3, 3]}
LAYERED = {"full_attention": LONG, "sliding_attention": DEFAULT}
# One class for each formula of transformers.
CLASSES: dict[tuple[str, str, str], dict[str, Any]] = {
    ("phi3", "Phi3RotaryEmbedding", "Phi3Config"): LONG,
    ("phimoe", "PhimoeRotaryEmbedding", "PhimoeConfig"): {**LONG, **SCALES},
    ("minicpm3", "MiniCPM3RotaryEmbedding", "MiniCPM3Config"): {
        **LONG,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
    ("cohere", "CohereRotaryEmbedding", "CohereConfig"): LONG,
    ("olmo", "OlmoRotaryEmbedding", "OlmoConfig"): LONG,
    ("gpt_oss", "GptOssRotaryEmbedding", "GptOssConfig"): LONG,
    ("llama4", "Llama4TextRotaryEmbedding", "Llama4TextConfig"): LONG,
    ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", "Qwen3VLTextConfig"): {**LONG, **AXES},
    ("gemma3", "Gemma3RotaryEmbedding", "Gemma3TextConfig"): LAYERED,
    ("olmo3", "Olmo3RotaryEmbedding", "Olmo3Config"): LAYERED,
    ("cohere_compass", "CohereCompassRotaryEmbedding", "CohereCompassTextConfig"): {
        name: {**rope, **AXES} for name, rope in LAYERED.items()
    },
}


def rotary(family: str, name: str, config: str, rope: dict[str, Any]) -> nn.Module:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    configs = import_module(f"transformers.models.{family}.configuration_{family}")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": LONGEST}
    more: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
    if family == "phi3":
        more["original_max_position_embeddings"] = ORIGINAL
    if family == "minicpm3":
        sizes["head_dim"] = 8
        more = {"qk_rope_head_dim": 8}
    made: nn.Module = getattr(module, name)(getattr(configs, config)(**sizes, **more, rope_parameters=rope))
    return made


def model_of(*modules: nn.Module) -> Any:
    """A model whose decoder has these modules."""
    return SimpleNamespace(get_decoder=lambda: nn.ModuleList(modules))


def cosines_and_sines(forward: Any, positions: list[int], layer_type: str | None) -> torch.Tensor:
    more = {} if layer_type is None else {"layer_type": layer_type}
    found = forward(torch.zeros(1), torch.tensor([positions]), **more)
    return torch.stack([*found]) if isinstance(found, tuple) else torch.view_as_real(found).movedim(-1, 0)


@pytest.mark.parametrize(("family", "name", "config"), CLASSES, ids=lambda value: value)
def test_each_token_is_rotated_as_its_text(family: str, name: str, config: str) -> None:
    rope = CLASSES[family, name, config]
    own, ours = (rotary(family, name, config, rope) for _ in range(2))
    rotating = rotate_by_text(model_of(ours), ORIGINAL, LONGEST)
    assert rotating.original == ORIGINAL
    layer_types = [None] if "rope_type" in rope else ["full_attention", "sliding_attention"]
    # A decode of a long text, a chunk of a short one, a chunk of a long one.
    parts = [([40], True), ([3, 4, 5], False), ([0, 1, 15, 16], True)]
    positions = [position for part, _ in parts for position in part]
    flags = torch.tensor([is_long for part, is_long in parts for _ in part])
    for layer_type in layer_types:
        with rotating.rotating(flags):
            found = cosines_and_sines(ours, positions, layer_type)
        # A long text is one whose last position is beyond.
        whole = [(part + [LONGEST - 1] * is_long, len(part)) for part, is_long in parts]
        expected = [cosines_and_sines(own, part, layer_type)[..., :count, :] for part, count in whole]
        assert torch.equal(found, torch.cat(expected, dim=-2))
        assert torch.equal(cosines_and_sines(ours, positions, layer_type)[..., 1:4, :], expected[1]), "short by itself"


def test_a_token_with_several_positions_is_rotated_as_its_text() -> None:
    known = ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", "Qwen3VLTextConfig")
    own, ours = (rotary(*known, CLASSES[known]) for _ in range(2))
    rotating = rotate_by_text(model_of(ours), ORIGINAL, LONGEST)
    short = torch.tensor([[[3, 4, 5]], [[3, 3, 4]], [[3, 6, 7]]])
    long = torch.tensor([[[30, 31]], [[2, 2]], [[30, 33]]])
    with rotating.rotating(torch.tensor([False] * 3 + [True] * 2)):
        found = torch.stack(ours(torch.zeros(1), torch.cat([short, long], dim=-1)))
    expected = [torch.stack(own(torch.zeros(1), positions)) for positions in (short, long)]
    assert torch.equal(found, torch.cat(expected, dim=-2))


def test_another_original_context_is_refused_by_name() -> None:
    longer = {**LONG, "original_max_position_embeddings": 2 * ORIGINAL}
    module = rotary("gemma3", "Gemma3RotaryEmbedding", "Gemma3TextConfig", {**LAYERED, "sliding_attention": longer})
    with pytest.raises(
        ModelRefused, match=r"0 \(Gemma3RotaryEmbedding\) .* beyond 16, 32 tokens.*; set max_context to 16"
    ):
        rotate_by_text(model_of(module), ORIGINAL, LONGEST)


def test_factors_that_nothing_chooses_between_are_refused() -> None:
    with pytest.raises(ModelRefused, match=r"beyond 16 tokens \(longrope\), but no rotary.*set max_context to 16"):
        rotate_by_text(model_of(nn.Linear(2, 2)), ORIGINAL, LONGEST)


class _LooksAtAll(nn.Module):
    """A rotary embedding whose formula is not one of frequencies and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.rope_type = "longrope"
        self.config = SimpleNamespace(rope_parameters=LONG)
        self.inv_freq = nn.Buffer(torch.ones(8))
        self.attention_scaling = 1.0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * self.inv_freq / position_ids.max()
        return angles.cos(), angles.sin()


class _TakesMore(_LooksAtAll):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor) -> Any:  # type: ignore[override]
        raise AssertionError("it is called without lengths")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_LooksAtAll, r"0 \(_LooksAtAll\) computes .* differ by"),
        (_TakesMore, r"0 \(_TakesMore\) cannot rotate .*lengths"),
    ],
)
def test_another_formula_is_refused_by_name(module: type[nn.Module], reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason + r".*; set max_context to 16 or less"):
        rotate_by_text(model_of(module()), ORIGINAL, LONGEST)


@pytest.mark.parametrize(
    ("lost", "family"), [("frequencies", "phi3"), ("choice", "phi3"), ("scale", "phimoe"), ("choice", "phimoe")]
)
def test_the_proof_sees_what_is_lost(lost: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PhiMoE has two scales, the others two sets of frequencies."""
    of = long_rope._Rotations.of

    def broken(self: Any, is_long: torch.Tensor | None) -> Any:
        if lost == "choice":
            return of(self, None if is_long is None else ~is_long)
        return of(self, is_long)._replace(**{lost: getattr(self.short, lost)})

    monkeypatch.setattr(long_rope._Rotations, "of", broken)
    ((known, rope),) = [(known, rope) for known, rope in CLASSES.items() if known[0] == family]
    with pytest.raises(ModelRefused, match=f"{known[1]}.*differ by"):
        rotate_by_text(model_of(rotary(*known, rope)), ORIGINAL, LONGEST)


def test_an_error_within_a_step_leaves_no_flags() -> None:
    rope = LongRope(ORIGINAL)
    with pytest.raises(KeyError), rope.rotating(torch.tensor([True])):
        raise KeyError
    assert rope._is_long is None
