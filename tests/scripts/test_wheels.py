"""``scripts/gpu-wheels``: what it fetches, and whether that is all that an image lacks."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
from gpu_checks.wheels import CARRIED, IMAGE, Wheel, command, pins, problems, project_needs, read_wheel

ALL = [Wheel(name, "5.23.0" if name == "transformers" else "99", ()) for name in CARRIED]
# As if the project asked for no more than is there.
FITTING = ["torch>=2.11", "transformers>=5.23", "uvicorn[standard]>=0.40"]


def with_needs(*needs: str) -> list[Wheel]:
    return [*ALL[:-1], Wheel(ALL[-1].name, ALL[-1].version, needs)]


def test_what_is_carried_and_what_is_there_is_enough() -> None:
    needs = (
        "tokenizers<0.24,>=0.23.1",
        "Click>=7",
        'tomli; python_version < "3.11"',
        'watchfiles; extra == "standard"',
    )
    assert list(problems(with_needs(*needs), FITTING)) == []


def test_the_project_itself_asks_for_nothing_else() -> None:
    asked = {re.split("[[=>]", need)[0] for need in project_needs()}
    assert asked <= {*CARRIED, *IMAGE}
    assert not {*CARRIED} & {*IMAGE}


@pytest.mark.parametrize(
    ("wheels", "needs", "problem"),
    [
        (with_needs("odd-thing>=1"), FITTING, "uvicorn needs odd-thing, which is neither carried nor on the image"),
        (with_needs("tokenizers>=0.24"), FITTING, "uvicorn needs tokenizers >=0.24, but 0.23.2 is there"),
        (with_needs("pydantic-core==2"), FITTING, "uvicorn needs pydantic-core ==2, but 99 is carried"),
        (ALL[1:], [], f"{CARRIED[0]} was not fetched"),
        (ALL, ["torch>=3"], "this project needs torch >=3, but 2.11.0 is there"),
    ],
    ids=["nowhere", "older there", "another carried", "not fetched", "the project"],
)
def test_what_is_missing_is_named(wheels: list[Wheel], needs: list[str], problem: str) -> None:
    assert list(problems(wheels, needs)) == [problem]


def test_a_wheel_is_read_by_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "odd_thing-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vendored/other-1.dist-info/METADATA", "Name: other\n")
        metadata = (
            "Metadata-Version: 2.1\nName: Odd_Thing\nVersion: 1.2\nRequires-Dist: click>=7\nRequires-Dist: h11\n\nText"
        )
        archive.writestr("odd_thing-1.2.dist-info/METADATA", metadata)
    assert read_wheel(path) == Wheel("odd-thing", "1.2", ("click>=7", "h11"))


def test_versions_are_those_of_the_constraints(tmp_path: Path) -> None:
    asked = command(tmp_path, "python")
    assert "transformers==5.23.0" in asked
    assert "--no-deps" in asked
    assert asked[-len(CARRIED) :] == pins((Path(__file__).parents[2] / "constraints.txt").read_text())
    with pytest.raises(KeyError):
        pins("torch==1\n")
