"""Models whose weights stay in blocks on a GPU: what is proved, what is computed, and that nothing waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks.machine import Machine
from gpu_checks.models import Pages, loaded, make_runner
from support.gguf_converter import converted, quantised, unquantised, write_gguf
from support.gguf_families import FAMILIES
from support.held_weight import HeldWeight
from support.random_blocks import random_blocks
from support.recording import record
from transformers import AutoModelForCausalLM

from engine.attention.triton_paged import TritonAttention
from engine.closeness import REORDERED_SUMS, difference
from engine.gguf.architectures import changes_of, config_of
from engine.gguf.header import read_header
from engine.gguf.weights import stored_weights
from engine.packed.experts import INTERFACE
from engine.packed.loading import load_stored
from engine.packed.modules import OnDevice, PackedEmbedding, PackedLinear, Stack, num_parameters
from engine.packed.schemes import Blocks
from engine.packed_triton import matrices
from engine.packed_triton.grouped import plan_of
from engine.packed_triton.matrices import Matrices
from engine.packed_triton.planes import Planes, planes_of
from engine.scheduling.sequence import ScheduledChunk

CPU = torch.device("cpu")
PROMPT = [5, 9, 40, 77, 3, 120, 250, 11]


def test_slots_are_grouped_by_expert() -> None:
    places = torch.tensor([4, 1, 1, 5, 0, 4, 1, 4, 4, 9])  # of five experts: two name none
    plan = plan_of(places, 5)
    seen: list[int] = []
    for expert, first, count in plan.tiles.tolist():
        slots = plan.slots[first : first + count]
        assert (places[slots] == expert).all()
        seen += slots.tolist()
    assert sorted(seen) == [0, 1, 2, 4, 5, 6, 7, 8]
    many = torch.arange(400) % 3
    tall = plan_of(many, 2)
    assert tall.tile.rows > 16
    assert sum(count for _, _, count in tall.tiles.tolist()) == 267


@pytest.mark.parametrize("name", ["MXFP4", "Q6_K"])
def test_products_of_experts(name: str) -> None:
    blocks = random_blocks(name, 5, 24, 256)
    stack = Matrices(CPU, torch.bfloat16).stack_of(HeldWeight(blocks))
    assert isinstance(stack, Stack)
    numbers = blocks.unpacked(torch.bfloat16).float()
    rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    places = torch.tensor([0, 4, 4, 2, 7, 0])
    found = stack(rows, stack.plan(places))
    expected = torch.stack(
        [
            numbers[expert] @ rows[slot // 2].float() if expert < 5 else torch.zeros(24)
            for slot, expert in enumerate(places.tolist())
        ]
    )
    assert difference(found, expected) < 0.3 * REORDERED_SUMS[torch.bfloat16]
    alone = stack[4](rows[:1])
    assert torch.equal(alone[0], found[1])


def test_weights_that_share_their_blocks_share_their_planes() -> None:
    make, held = Matrices(CPU, torch.bfloat16), HeldWeight(random_blocks("Q8_0", 8, 64))
    assert isinstance(make, OnDevice)
    assert make.matrix_of(held) is make.matrix_of(held)
    assert make.matrix_of(HeldWeight(random_blocks("Q8_0", 8, 64))) is not make.matrix_of(held)


@pytest.mark.parametrize("what", ["numbers", "products", "products of experts"])
def test_a_scheme_that_is_computed_otherwise_is_unpacked(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(blocks: Blocks, device: torch.device) -> Planes | None:
        planes = planes_of(blocks, device)
        if planes is not None and blocks.scheme.name == "Q8_0":
            planes.scales *= 2
        return planes

    def trusted(*_: object) -> str:
        return ""

    monkeypatch.setattr(matrices, "planes_of", wrong)
    if what != "numbers":
        monkeypatch.setattr(Matrices, "_prove_numbers", trusted)
    make = Matrices(CPU, torch.bfloat16)
    if what == "products of experts":
        assert make.stack_of(HeldWeight(random_blocks("Q8_0", 2, 8, 64))) is None
        assert make.stack_of(HeldWeight(random_blocks("Q4_0", 2, 8, 64))) is not None
    else:
        assert make.matrix_of(HeldWeight(random_blocks("Q8_0", 8, 64))) is None
        assert make(random_blocks("Q8_0", 8, 64, seed=1)) is None
        assert make(random_blocks("Q4_0", 8, 64)) is not None
    (message,) = caplog.messages
    assert message.startswith(
        "Weights in Q8_0 are unpacked to bfloat16, which takes 1.9 times their memory and is slower"
    )
    assert f"{what} differ by" in message


def test_what_the_kernels_do_not_know_is_unpacked(caplog: pytest.LogCaptureFixture) -> None:
    make = Matrices(CPU, torch.bfloat16)
    assert make(random_blocks("NF4", 8, 64)) is None
    no_number = random_blocks("F8_32", 8, 64)
    no_number.data[3, 7] = 127
    assert make(no_number) is None
    assert not caplog.messages


def load(path: Path, make: Matrices | None) -> Any:
    header = read_header(path)
    config = config_of(header)
    weights = stored_weights(header, changes_of(header, config))
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    model, report = load_stored(model_class, config, weights, torch.bfloat16, make, attn_implementation="eager")
    assert not report["missing_keys"]
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gpt-oss"])
def test_models_are_the_same(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    data = quantised(tensors, {"exps": "MXFP4", "attn|embd|output": "Q8_0", "ffn": "Q4_0"})
    packed = load(write_gguf(tmp_path / "b.gguf", family.architecture, keys, data), Matrices(CPU, torch.bfloat16))
    plain = load(write_gguf(tmp_path / "p.gguf", family.architecture, keys, unquantised(data)), None)
    assert num_parameters(packed) == num_parameters(plain)
    kinds = [
        type(module).__bases__ for module in packed.modules() if isinstance(module, PackedLinear | PackedEmbedding)
    ]
    assert len(kinds) > 4
    stacks = [module for module in packed.modules() if hasattr(module, "packed_products")]
    assert bool(stacks) == (name != "llama")
    for module in stacks:
        assert module.config._experts_implementation_internal == INTERFACE
        assert all(isinstance(each, Stack) for each in module.packed_products.values())
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = plain(input_ids=ids, use_cache=False).logits
        assert difference(packed(input_ids=ids, use_cache=False).logits, expected) < 2 * REORDERED_SUMS[torch.bfloat16]


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_experts_can_be_recorded(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    path = write_gguf(tmp_path / "m.gguf", family.architecture, keys, quantised(tensors, {"exps": "MXFP4"}))
    model = load(path, Matrices(CPU, torch.bfloat16))
    experts = next(module for module in model.modules() if hasattr(module, "packed_products"))
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    chosen, weights = torch.tensor([[0, 3], [3, 1], [2, 0]]), torch.full((3, 2), 0.5).bfloat16()
    found = torch.zeros_like(hidden)

    def compute() -> None:
        found.copy_(experts(hidden, chosen, weights))

    with torch.inference_mode():
        record(compute)()
        for each in experts.packed_products:  # as one expert after another computes it, with the same products
            experts.packed_products[each] = [experts.packed_products[each][expert] for expert in range(4)]
        expected = experts(hidden, chosen, weights)
    assert expected.abs().max() > 0
    assert difference(found, expected) < REORDERED_SUMS[torch.bfloat16]


def test_the_recipe_of_a_gpu_serves_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rewritten where that is proved, and recorded."""
    caplog.set_level("INFO")
    family = replace(FAMILIES["qwen3"], config={"num_hidden_layers": 1})
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    data = quantised(tensors, {"attn|embd|output": "Q8_0", "ffn": "Q4_0"})
    model = load(write_gguf(tmp_path / "b.gguf", family.architecture, keys, data), Matrices(CPU, torch.bfloat16))
    plain = load(write_gguf(tmp_path / "p.gguf", family.architecture, keys, unquantised(data)), None)
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1].float()
    machine = Machine(CPU, True, TritonAttention, record)
    runner = make_runner(machine, loaded(model), len(PROMPT), max_running=1, kv_memory=1e6)
    assert [shape.only_decodes for shape in runner.recorded_shapes] == [True]
    assert "1 of 1 gated MLPs are fused" in caplog.messages
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    pages = Pages(runner)
    sequence = pages.sequence(PROMPT, len(PROMPT))
    runner.forward([ScheduledChunk(sequence, 0, len(PROMPT) - 1)])
    found = runner.forward([ScheduledChunk(sequence, len(PROMPT) - 1, 1)])[0]
    assert difference(found, expected) < 2 * REORDERED_SUMS[torch.bfloat16]
