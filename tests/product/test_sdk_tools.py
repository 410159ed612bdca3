"""Function calling from the real model, driven by the official Python SDK's own loop, in three versions."""

from __future__ import annotations

import pytest
from support.sdks import CLIENTS, PYTHON_SDKS, check_report, sdk_python
from support.server import RunningServer

pytestmark = pytest.mark.product


@pytest.mark.parametrize("version", PYTHON_SDKS)
def test_the_sdks_loop_ends_with_the_result_in_the_context(version: str, castor: RunningServer) -> None:
    check_report([sdk_python(version), CLIENTS / "genai_tools.py", castor.url], 8)
