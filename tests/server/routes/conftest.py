"""One application over a scripted engine for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.fakes import Harness, serving, tokenizer_folder


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with serving(tokenizer_folder(tmp_path / "tiny")) as started:
        yield started
