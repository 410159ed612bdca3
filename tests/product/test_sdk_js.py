"""The official JavaScript SDK, through Node, against the real server."""

from __future__ import annotations

import pytest
from support.sdks import CLIENTS, JS_SDK, check_report, environment, node
from support.server import RunningServer

pytestmark = pytest.mark.product


@pytest.mark.parametrize("prefix", ["", "/genai"])
def test_the_sdk_does_its_whole_job(prefix: str, restless: RunningServer) -> None:
    environment(JS_SDK.name, "node_modules")
    check_report([node(), CLIENTS / "genai_client.mjs", JS_SDK, restless.url + prefix], 12, "3.1.0")
