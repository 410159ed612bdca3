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


def test_warnings_and_what_nothing_catches_are_in_the_log() -> None:
    code = """
import threading, warnings
from server.observability.logs import configure_logging
from server.families.transformers_import import library
configure_logging("info")
library()
import logging
warnings.warn("old\\nways")
logging.getLogger("transformers.tokenization_utils").error("too long")
def fail():
    raise LookupError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Bad:
    def __del__(self):
        raise LookupError("in a finaliser")
Bad()
raise LookupError("at the end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    warned, library, thread, finaliser, end = [json.loads(line) for line in done.stderr.splitlines()]
    assert warned["logger"] == "py.warnings"
    assert "old\nways" in warned["event"]
    assert (library["event"], library["logger"]) == ("too long", "transformers.tokenization_utils")
    for entry, place in ((thread, "in a thread"), (finaliser, "in a finaliser"), (end, "at the end")):
        assert entry["event"] == "uncaught exception"
        assert f"LookupError: {place}" in entry["exception"]
