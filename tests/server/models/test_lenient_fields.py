"""Fields that an operator lets pass: names that are none are refused before the server starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.config.errors import ConfigError
from server.config.models_file import ModelSpec, load_specs
from server.models.lenient import check_lenient

BUILTIN = Path(__file__).parents[3] / "models.yaml"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (
            "generationConfig.thinkingBudget",
            "lenient names 'generationConfig.thinkingBudget', which is no field that a request can do without; did you "
            "mean generationConfig.thinkingConfig or generationConfig.thinkingConfig.thinkingBudget or ",
        ),
        ("generation_config.seed", "did you mean generationConfig.seed or "),
        ("contents.parts.inlineData", "which is no field that a request can do without"),
        ("xyz", "'xyz', which is no field that a request can do without; docs/api.md lists"),
    ],
)
def test_a_name_that_is_no_field_is_refused(path: str, problem: str) -> None:
    specs = [ModelSpec("good", "x", lenient=("tools.googleSearch",)), ModelSpec("m", "x", lenient=(path,))]
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as refused:
        check_lenient(specs, "models.yaml")
    assert re.match("models.yaml, entry 'm': ", str(refused.value))
    assert problem in str(refused.value)


def test_the_models_file_that_castor_comes_with_is_right() -> None:
    check_lenient(load_specs(BUILTIN), str(BUILTIN))
