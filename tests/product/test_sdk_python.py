"""The official Python SDK, in three versions, each in an environment of its own, against the real server."""

from __future__ import annotations

import pytest
from support.sdks import CLIENTS, check_report, sdk_python
from support.server import RunningServer

pytestmark = pytest.mark.product


@pytest.mark.parametrize(("version", "prefix"), [("3.4.0", ""), ("2.34.0", "/genai"), ("1.60.0", "")])
def test_the_sdk_does_its_whole_job(version: str, prefix: str, castor: RunningServer) -> None:
    check_report([sdk_python(version), CLIENTS / "genai_client.py", castor.url + prefix], 14, version)
