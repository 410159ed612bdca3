"""The official Python SDK, in three versions, each in an environment of its own, against the real server."""

from __future__ import annotations

import pytest
from support.sdks import CLIENTS, check_report, sdk_python
from support.server import RunningServer

pytestmark = pytest.mark.product


@pytest.mark.parametrize(("version", "prefix"), [("3.6.1", ""), ("2.34.0", "/genai"), ("1.60.0", "")])
def test_the_sdk_does_its_whole_job(version: str, prefix: str, restless: RunningServer) -> None:
    check_report([sdk_python(version), CLIENTS / "genai_client.py", restless.url + prefix], 16, version)


@pytest.mark.parametrize("service", ["express", "project"])
def test_the_sdk_believes_to_speak_to_vertex_ai(service: str, restless: RunningServer) -> None:
    """With a key alone (express mode), and with a project, a location and a token."""
    check_report([sdk_python("3.6.1"), CLIENTS / "genai_client.py", restless.url, service], 15, "3.6.1")
