"""What is said of models that cannot be served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.api.errors import ModelRefused
from engine.model.probe import DryRunFailed
from engine.model.refusals import advised

PLANE = SimpleNamespace(model_type="plane", architectures=["PlaneForCausalLM"])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "its mask is round",
            "PlaneForCausalLM: its mask is round; decoders with full or sliding attention, gated ",
        ),
        (
            "layer 0 of plane is round",
            "layer 0 of plane is round; decoders with full or sliding attention, gated ",
        ),
        ("plane is round; only flat ones are served", "plane is round; only flat ones are served"),
    ],
)
def test_class_and_advice_are_added_where_they_are_missing(said: str, told: str) -> None:
    with pytest.raises(ModelRefused) as refusal, advised(PLANE):
        raise ModelRefused(said)
    assert str(refusal.value).startswith(told)


def test_an_error_of_the_models_own_code_is_left_as_it_is() -> None:
    with pytest.raises(DryRunFailed, match=r"^shapes differ$"), advised(PLANE):
        raise DryRunFailed("shapes differ")
