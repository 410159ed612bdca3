"""Requests of strangers, eight at a time: streams go on beside them, /healthz answers, and the server ends in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.beside import MODEL, Request, beside_streams

pytestmark = [pytest.mark.product, pytest.mark.timeout(600)]

REQUESTS = 24
MAX_GAP_SECONDS = 1.0
"""Beyond the gaps of streams that are alone."""
MAX_MEDIAN_HEALTH_SECONDS = 0.25
MAX_HEALTH_SECONDS = 5.0
MAX_GROWTH_BYTES = 300 * 2**20


def asking(body: Any) -> Request:
    return Request(f"/v1beta/models/{MODEL}:generateContent", json.dumps(body).encode())


def ordinary(number: int) -> Request:
    config = {"maxOutputTokens": 8, "temperature": 0}
    return asking({"contents": [{"parts": [{"text": f"Name river {number}."}]}], "generationConfig": config})


def a_thousand_contents(number: int) -> Request:
    """Eight megabytes in a thousand turns."""
    parts = [{"text": (f"{number} and so on " * 600)[:8000]}]
    return asking({"contents": [{"role": ("user", "model")[turn % 2], "parts": parts} for turn in range(1000)]})


KINDS: dict[str, tuple[Callable[[int], Request], set[int]]] = {
    "ordinary": (ordinary, {200}),
    "a thousand contents": (a_thousand_contents, {400}),
}
"""What is sent, by its number, and the statuses that it may be answered with."""


@pytest.mark.parametrize("kind", KINDS)
def test_streams_beside(kind: str, builtin_model: Path, tmp_path: Path) -> None:
    make, expected = KINDS[kind]
    found = beside_streams(tmp_path, [make(number) for number in range(REQUESTS)])
    print(f"{kind}: {found}")
    assert set(found.statuses) <= expected, found
    assert found.gap < found.alone + MAX_GAP_SECONDS, found
    assert found.median_health < MAX_MEDIAN_HEALTH_SECONDS, found
    assert max(found.health) < MAX_HEALTH_SECONDS, found
    assert found.peak - found.before < MAX_GROWTH_BYTES, found
    assert found.ended == 0, found
