"""The programs that run beside the servers, in small; how long they take is no matter here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.paged import lively_model_folder
from support.tiny import save_tiny_tokenizer
from tokenizers import Tokenizer

from benchmarks import host_steps, matmul, quality
from benchmarks.harness.beside import Beside, last_numbers
from benchmarks.harness.programs import output_of
from engine.api.engine import EngineConfig
from engine.native.packing import Format
from server.bench.prompts import Prompts
from server.bench.session import Plan
from server.config.errors import ConfigError


def beside(folder: Path, **plan: int) -> Beside:
    sizes = Plan("R7", (plan.pop("streams", 3),), **plan)  # type: ignore[arg-type]
    return Beside(EngineConfig(path=str(folder), max_running=4, kv_memory=2e8), sizes, Prompts(0))


def test_steps_of_the_scheduler(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (measured,) = beside(tmp_path, tokens=40).run("scheduler_steps.py", 1)
    assert (measured.server, measured.round, measured.name) == ("castor", 1, "steps")
    assert (measured.numbers["requests"], measured.numbers["steps"]) == (3, 40)
    assert 0 < measured.numbers["schedule_us_p50"] <= measured.numbers["schedule_us_p99"]
    assert 0 < measured.numbers["step_us_p50"] <= measured.numbers["step_us_p99"]


def test_the_host_time_of_steps_has_parts_that_make_up_its_total(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    parts = host_steps.measured(tokenizer, number=2, temperature=0.8, steps=40)
    assert set(parts) == {"schedule", "forward", "launch", "text", "pack", "finish", "total"}
    assert 0 < parts["forward"] < parts["launch"] < parts["total"]


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduler_steps failed with status 1: .*"):
        beside(tmp_path / "nothing", tokens=4).run("scheduler_steps.py", 0)


@pytest.mark.product
def test_the_bare_core_answers_every_prompt(builtin_model: Path) -> None:
    (measured,) = beside(builtin_model, streams=2, tokens=6, requests=2, seconds=0).run("bare_core.py", 0)
    assert (measured.server, measured.name) == ("bare core", "2 streams")
    assert (measured.numbers["output_tokens"], measured.numbers["failed"]) == (16 * 6, 0)
    assert measured.numbers["output_tokens_per_second"] > 0


def test_the_quality_of_an_engine_that_is_exact(tmp_path: Path) -> None:
    folder = lively_model_folder(tmp_path / "model", "llama")
    windows = [[(7 * place + row) % 250 + 3 for place in range(24)] for row in range(3)]
    config = EngineConfig(path=str(folder), device="cpu", kv_memory=4e6, threads=2)
    compared = quality.compare_castor(config, windows, quality.reference(folder, windows))
    summary = quality.summaries({"castor": compared, "other": compared})
    assert summary["castor"]["places"] == 3 * 24
    assert summary["castor"]["agreement"][0] == 1.0
    assert summary["castor"]["mean_abs_logprob_difference"][0] < 1e-4
    assert summary["castor minus other"]["agreement"] == [0.0, 0.0]


def test_the_interval_of_a_mean() -> None:
    assert quality.interval([1.0, 3.0]) == pytest.approx([2.0, 1.96 * 2**0.5 / 2**0.5])


@pytest.mark.parametrize("format", Format)
def test_products_are_timed(format: Format) -> None:
    assert matmul.c_step(format, 2, matmul.ROUND)(3) > 0


def test_programs_that_do_not_answer() -> None:
    with pytest.raises(ConfigError, match="slow did not end within 0 s"):
        output_of("slow", [sys.executable, "-c", "import time; time.sleep(60)"], "", 0.3)
    assert last_numbers("good", 'words\n{"a": 1}\n') == {"a": 1.0}
    for said in ("", "words", "[1]", '{"a": "b"}', '{"a": null}'):
        with pytest.raises(ConfigError, match="bad did not end with a line of numbers"):
            last_numbers("bad", said)


def test_a_bare_core_that_fails_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.beside._numbers", lambda *_: {"failed": 2.0})
    failing = Beside(EngineConfig(path=""), Plan("frontend", (4,), tokens=4), Prompts(0))
    with pytest.raises(ConfigError, match="the bare core failed 2 requests with 4 streams"):
        failing.run("bare_core.py", 0)
