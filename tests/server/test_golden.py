"""Nothing that a client or an operator sees changes unseen: every answer equals its golden transcript.

A change that is meant is written down by ``PYTHONPATH=.:tests python -m support.golden [BEGINNING OF A FILE'S NAME]``,
and the difference of ``tests/data/golden`` is then part of what is reviewed.
"""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import pytest
from support import golden


@pytest.mark.parametrize("name", golden.names())
def test_the_answer_is_the_golden_one(name: str, tmp_path: Path) -> None:
    document, case = golden.find(name)
    expected, found = golden.kept(case), golden.answers(document, case, tmp_path)
    if not golden.same(found, expected):
        lines = [golden.dumped(answers).splitlines() for answers in (expected, found)]
        pytest.fail("\n".join(unified_diff(*lines, "golden", "answered", n=8, lineterm="")), pytrace=False)
