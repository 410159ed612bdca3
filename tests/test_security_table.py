"""The tests that docs/security.md names are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "security.md").read_text("utf-8").partition("## Limits")[2].partition("\n## ")[0]


def test_every_row_names_tests_that_exist() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| input"))]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"def {name}(" in (TESTS / path).read_text("utf-8"), (path, name)
