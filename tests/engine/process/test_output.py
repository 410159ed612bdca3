"""What an engine process writes: lines of JSON, whoever speaks in it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys

import pytest
from support.processes import read, ready_engine, request
from support.scripted_worker import Kind

from engine.process.output import JsonLines, relayed

SPEAKS = r"""
import logging, os, sys, warnings
from engine.process.output import JsonLines
handler = logging.StreamHandler()
handler.setFormatter(JsonLines())
logging.basicConfig(level="INFO", handlers=[handler])
logging.captureWarnings(True)
logging.getLogger("engine.some").info("loads %d weights", 7)
warnings.warn("deprecated")
print("a library prints\n\n  twice\r", flush=True)
os.write(2, b"so does C, \xff, without an end")
"""


async def spoken(code: str, *args: str) -> None:
    """Run a program whose output is relayed."""
    async with relayed() as output:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *args, stdout=output, stderr=output)
        os.close(output)
        await process.wait()


def entries(stderr: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.splitlines()]


async def test_a_log_of_json_is_passed_on_and_other_text_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    await spoken(SPEAKS)
    passed = entries(capfd.readouterr().err)
    assert [(entry["event"], entry["level"], entry["logger"]) for entry in passed[:1]] == [
        ("loads 7 weights", "info", "engine.some")
    ]
    assert "deprecated" in str(passed[1]["event"])
    assert passed[1]["logger"] == "py.warnings"
    said = [record.getMessage() for record in caplog.records if record.name == "castor.engine.output"]
    assert sorted(said) == sorted(["a library prints", "twice", "so does C, \ufffd, without an end"])


async def test_a_line_without_end_is_cut_and_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    await spoken("import sys; sys.stdout.write('x' * (3 << 20))")
    said = [record.getMessage() for record in caplog.records if record.name == "castor.engine.output"]
    assert len(said) >= 3
    assert "".join(said) == "x" * (3 << 20)


async def test_what_an_engine_prints_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with ready_engine() as process_engine:
        await read(process_engine.submit(request("a", kind=Kind.PRINTS)))
    assert "a library prints" in caplog.text


def test_a_record_with_its_trace_is_one_line() -> None:
    try:
        raise LookupError("why")
    except LookupError:
        record = logging.LogRecord("engine", logging.ERROR, "", 0, "it\nends: %s", ("x",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["logger"]) == ("it\nends: x", "error", "engine")
    assert "LookupError: why" in entry["exception"]
    assert entry["timestamp"].endswith("+00:00")
