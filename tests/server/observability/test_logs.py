"""The log as the operator's programs read it."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_log_is_one_json_object_per_line_whoever_speaks() -> None:
    code = """
import logging
from server.observability.logs import configure_logging, log
configure_logging("info")
log.info("request", status=200)
log.debug("unheard")
logging.getLogger("uvicorn.error").info("chatter")
logging.getLogger("uvicorn.error").warning("Invalid HTTP %s", "request")
try:
    raise LookupError("why")
except LookupError as error:
    log.error("broke", exc_info=error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    request, foreign, broke = [json.loads(line) for line in done.stderr.splitlines()]
    assert (request["event"], request["status"], request["level"]) == ("request", 200, "info")
    assert (foreign["event"], foreign["logger"]) == ("Invalid HTTP request", "uvicorn.error")
    assert "LookupError: why" in broke["exception"]
    assert done.stdout == ""
