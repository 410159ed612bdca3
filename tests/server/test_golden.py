"""Nothing that a client or an operator sees changes unseen: every answer equals its golden transcript.

A change that is meant is written down by ``PYTHONPATH=.:tests python -m support.golden [BEGINNING OF A FILE'S NAME]``,
and the difference of ``tests/data/golden`` is then part of what is reviewed.
"""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import pytest
from support.golden import answers
from support.golden_files import dumped, find, kept, names, same


@pytest.mark.parametrize("name", names())
def test_the_answer_is_the_golden_one(name: str, tmp_path: Path) -> None:
    document, case = find(name)
    expected, found = kept(case), answers(document, case, tmp_path)
    if not same(found, expected):
        lines = [dumped(some).splitlines() for some in (expected, found)]
        pytest.fail("\n".join(unified_diff(*lines, "golden", "answered", n=8, lineterm="")), pytrace=False)
