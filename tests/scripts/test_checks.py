"""What ``scripts/gpu_check`` is made of: time, report, goals, and the ways to compute what it compares with."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks import goals, stand_ins
from gpu_checks.budget import Budget
from gpu_checks.check import Check
from gpu_checks.machine import Machine
from gpu_checks.models import Models, as_published, plain_logits, random_module
from gpu_checks.parts import core
from gpu_checks.parts.attention import FORMS, difference, plain_products
from gpu_checks.parts.correctness import SMALL, compare_model
from gpu_checks.report import Report
from gpu_checks.tokens import EOS, make_tokenizer
from support.paged import lively_model_folder, plain_model
from support.paged import plain_logits as plain_logits_of_tests
from transformers.models.llama import modeling_llama

from engine.attention.gather import ReferenceAttention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    machine = Machine(torch.device("cpu"), True, ReferenceAttention, stand_ins.record)
    budget = Budget(time.monotonic(), 60, {"correctness": 1.0})
    budget.begin("correctness")
    return Check(machine, Models(machine), budget, Report(tmp_path / "out.json", 60, ["correctness"]))


def test_a_model_that_cannot_be_checked_is_a_finding(check: Check) -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    compare_model(check, "odd", fail, 1e-3, (5,))
    (found,) = check.report.findings
    assert (found.name, found.state, found.value) == ("odd", "WRONG", math.inf)
    assert found.note == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert check.report.is_bad


def test_an_answer_with_a_grammar_takes_every_second_step_beside_free_ones(check: Check) -> None:
    pytest.importorskip("llguidance")
    core.run(check)
    assert not check.report.is_bad
    beside = next(found for found in check.report.findings if "beside one with a grammar" in found.name)
    assert beside.note.endswith("; the one with a grammar took part in 1 of 2 steps")
    assert [windows["grammar"]["joined"] for windows in beside.data] == [1] * 4
    assert [windows["free"]["joined"] for windows in beside.data] == [2] * 4
    assert (check.report.value("core", goals.GRAMMAR.name) or 0) > 0


def test_plain_logits_are_by_the_models_own_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_model(lively_model_folder(tmp_path, "llama", num_hidden_layers=2))
    text = [5 + (i * i) % 200 for i in range(20)]
    expected = plain_logits_of_tests(plain, text)

    def ours(*_: Any, **__: Any) -> Any:
        pytest.fail("not transformers' own")

    ours.castor_original = modeling_llama.apply_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ours)
    torch.testing.assert_close(plain_logits(plain, text), expected)


def test_a_model_is_as_published_for_a_block_only() -> None:
    module = random_module("llama", torch.float32, torch.device("cpu"), **SMALL)
    before = module.config._attn_implementation
    with as_published(module, "eager"):
        assert module.config._attn_implementation == "eager"
    assert module.config._attn_implementation == before != "eager"


def test_torchs_own_attention_is_as_it_was_after_the_comparisons() -> None:
    def switches() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()

    before = switches()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with plain_products():
            assert switches() == (False, False, False)
        assert switches() == (*before[:2], False)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[2])


def test_numbers_that_are_none_are_infinitely_far() -> None:
    assert difference(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf
    assert difference(torch.ones(2), torch.ones(3)) == math.inf
    assert difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25


def test_time_that_a_part_leaves_over_goes_to_those_after_it() -> None:
    now = time.monotonic()
    budget = Budget(now, 1.05, {"first": 1, "second": 2})  # of 63 seconds 3 are for the table
    assert budget.begin("first") == pytest.approx(20, abs=2)
    assert budget.begin("second") == pytest.approx(60, abs=3)  # the first took nothing
    assert 50 < budget.left <= 60
    late = Budget(now - 1000, 1, {"first": 1})
    assert late.begin("first") == 0
    assert late.left <= 0


def test_the_file_is_whole_and_says_what_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    report = Report(path, 7, ["kernels"])
    report.doing("kernels: a product")
    report.compared("correctness", "attention", math.nan, 1e-3)
    report.share(goals.COPY, 0.45, "slow")
    found = json.loads(path.read_text())
    assert found["doing"] == "kernels: a product"
    assert [finding["state"] for finding in found["findings"]] == ["WRONG", "measured"]
    assert found["findings"][0]["value"] == "nan"
    (copy,) = [goal for goal in found["goals"] if goal["name"] == goals.COPY.name]
    assert (copy["measured"], copy["goal"], copy["least"]) == (0.45, 0.9, 0.85)
    line = next(line for line in report.table() if goals.COPY.name in line)
    assert line.split()[-4:] == ["0.85", "0.45", "0.50", "missed"]
    assert not [line for line in report.table() if goals.ARRIVAL.name in line], "of parts that were not asked for"
    assert list(path.parent.iterdir()) == [path]


def test_a_goal_that_is_a_limit_is_met_below_it() -> None:
    assert goals.ARRIVAL.ratio(1.5) == 2.0
    assert goals.DECODE_1.ratio(0.375) == 0.5
    assert [goals.ARRIVAL.verdict(times) for times in (2.9, 3.9, 4.1)] == ["met", "enough", "missed"]
    assert [goals.DECODE_1.verdict(share) for share in (0.75, 0.70, 0.6)] == ["met", "enough", "missed"]


def test_goals_of_one_card_are_asked_of_no_other(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json", 7, ["decode"])
    report.describe({"device": "NVIDIA L4"})
    assert not [line for line in report.table() if goals.STEP_64.name in line]
    report.describe({"device": "NVIDIA H100 80GB HBM3"})
    assert [line for line in report.table() if goals.STEP_64.name in line]


@pytest.mark.parametrize(
    ("name", "bandwidth", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 3350, 989),
        ("NVIDIA H100 PCIe", 2000, 756),
        ("NVIDIA H200", 4800, 989),
        ("NVIDIA A100-SXM4-80GB", 2039, 312),
        ("NVIDIA A100 80GB PCIe", 1935, 312),
        ("NVIDIA A100-SXM4-40GB", 1555, 312),
        ("NVIDIA GeForce RTX 4090", 1008, None),
        ("NVIDIA L4", 300, None),
        ("NVIDIA L40S", 864, None),
    ],
)
def test_devices_are_known_by_their_names(name: str, bandwidth: float, tflops: float | None) -> None:
    assert goals.datasheet(name) == goals.Datasheet(bandwidth, tflops)


def test_an_unknown_device_has_no_datasheet() -> None:
    assert goals.datasheet("NVIDIA Unheard Of") is None


def test_every_token_has_a_text_and_words_are_one_token() -> None:
    tokenizer = make_tokenizer(3000)
    assert tokenizer.get_vocab_size() == 3000
    assert len(tokenizer.encode("the of and time could").ids) == 5
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in (3, 259, 1000, 2999))
    assert tokenizer.encode(f"hi{EOS}").ids[-1] == tokenizer.token_to_id(EOS)


# Kernels are compiled for a GPU that is not there, by the very calls that launch them on one that is.
COMPILING = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import torch
from functools import partial
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
from engine.attention.triton_kernels import decode_kernel, prefill_kernel
from engine.attention.triton_write import write_kernel
from engine.attention.triton_paged import TritonAttention
from gpu_checks import precompile
from gpu_checks.machine import Machine
from gpu_checks.parts.attention import FORMS

machine = Machine(torch.device("cpu"), True, partial(TritonAttention, processors=132), None)
def broken(): raise ValueError
plans = [partial(precompile._attention, machine, FORMS["one head each"], torch.float32), broken]
print(precompile.compile_ahead(plans))
for kernel in (decode_kernel, prefill_kernel, write_kernel):
    made = kernel.device_caches[0][0].values()
    print(len(made), all(len(each.asm["cubin"]) > 1000 for each in made))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is installed on Linux only")
def test_kernels_are_compiled_before_they_are_launched() -> None:
    assert "one head each" in FORMS
    run = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=False, timeout=250)
    assert run.stdout.splitlines() == ["1 kernels could not be prepared", "1 True", "1 True", "1 True"], run.stderr
