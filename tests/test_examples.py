"""Property tests see the same examples whatever is imported, and more of them in proportion to the profile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from support.examples import EXPLORING, NORMAL, examples

PLAIN = "from hypothesis import given, settings, strategies as st"
OURS = """
from support.examples import register_profiles
register_profiles()
settings.load_profile("castor")
"""
DRAWING = """
words = st.lists(st.text("ab", max_size=6))

@settings(derandomize=True, database=None, max_examples=500)
@given(st.integers(0, 10**6), words, words, st.floats(), st.binary())
def draw(number, some, more, real, raw):
    print((number, some, more, real, raw))

draw()
"""
# Literals that those strategies may draw.
FOUND = [*range(100, 300), *(f"{number:05b}".replace("0", "a").replace("1", "b") for number in range(32)), 0.12345]


def drawn(folder: Path, *lines: str) -> list[str]:
    """What a program of these lines draws that may import ``constants`` from the folder."""
    program = "\n".join((f"import sys; sys.path[:0] = [{str(folder)!r}, *{sys.path!r}]", PLAIN, *lines, DRAWING))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.splitlines()


def test_what_is_imported_does_not_change_the_examples(tmp_path: Path) -> None:
    (tmp_path / "constants.py").write_text(f"{FOUND}\n")
    first, second = drawn(tmp_path, OURS), drawn(tmp_path, OURS, "import constants")
    assert first == second
    assert len(first) >= 500
    assert drawn(tmp_path, "import constants") != drawn(tmp_path), "then it needs no help of ours"


@pytest.mark.parametrize(("profile", "number"), [("castor", 30), ("explore", 30 * EXPLORING // NORMAL)])
def test_the_number_of_examples_follows_the_profile(profile: str, number: int) -> None:
    loaded = settings.get_current_profile_name()
    try:
        settings.load_profile(profile)
        assert examples(30) == number
        assert settings.default.derandomize == (profile == "castor")
    finally:
        settings.load_profile(loaded)
