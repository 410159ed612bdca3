"""Requests of strangers, eight at a time: streams go on beside them, /healthz answers, and the server ends in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.beside import AT_ONCE, beside_streams, status_after_the_signal
from support.server import RunningServer, running_server
from support.strangers import KINDS

pytestmark = [pytest.mark.product, pytest.mark.timeout(600)]

REQUESTS = AT_ONCE
MAX_GAP_SECONDS = 3.0
"""Beyond the gaps of streams that are alone: generous, because the machine may have more to do. docs/security.md tells
what was measured."""
MAX_MEDIAN_HEALTH_SECONDS = 0.5
MAX_HEALTH_SECONDS = 5.0
MAX_GROWTH_BYTES = 300 * 2**20


@pytest.fixture(scope="module")
def castor(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("castor"), "--drain-seconds", "1") as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_streams_beside(kind: str, castor: RunningServer) -> None:
    make, expected = KINDS[kind]
    found = beside_streams(castor, [make(number) for number in range(REQUESTS)])
    print(f"{kind}: {found}")
    assert set(found.statuses) <= expected, found
    assert found.gap < found.alone + MAX_GAP_SECONDS, found
    assert found.median_health < MAX_MEDIAN_HEALTH_SECONDS, found
    assert max(found.health) < MAX_HEALTH_SECONDS, found
    assert found.peak - found.before < MAX_GROWTH_BYTES, found


def test_it_ends_in_time_whatever_is_under_way(builtin_model: Path, tmp_path: Path) -> None:
    server = RunningServer(tmp_path, "--drain-seconds", "5")
    try:
        server.wait_until_ready()
        assert status_after_the_signal(server, [make(number) for number, (make, _) in enumerate(KINDS.values())]) == 0
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.stop()
