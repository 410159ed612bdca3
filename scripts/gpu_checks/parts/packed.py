"""Weights in blocks: are the products of each scheme right, and how fast are they beside bfloat16's?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from engine.closeness import REORDERED_SUMS, ROUNDING
from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.machine import Machine
from gpu_checks.parts.attention import difference
from gpu_checks.random_blocks import random_blocks
from gpu_checks.report import reason_of

PART = "packed"
SCHEMES = ("Q4_K", "I4_128", "F8_128", "Q6_K", "MXFP4", "Q8_0", "Q4_0", "I4_32", "F8_32", "NVFP4", "Q5_K", "I8_128")
# Those that are timed as the layers of an 8B, and the goal of the first.
TIMED = {"I4_128": goals.PACKED_INT4, "Q4_K": None, "F8_128": None}
# Llama-3.1-8B: inputs and outputs of the linear maps of a layer, and of those that bfloat16 has in one.
LAYER = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
JOINED = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
SMOKE_LAYER = ((256, 64), (512, 32))
# More than any cache holds, also with four bits to a weight.
LAYERS = 4
ROWS = (1, 16, 64, 300)
# Qwen3-30B-A3B: experts, those of a token, and the sizes of their two maps.
EXPERTS = (128, 8, (2048, 1536), (768, 2048))
SMOKE_EXPERTS = (4, 2, (256, 64), (256, 32))


@torch.inference_mode()
def run(check: Check) -> None:
    """Compare every scheme, then time, the most important first."""
    try:
        import engine.packed_triton.products  # noqa: F401
    except ImportError as error:
        check.report.skipped(PART, "everything", f"not installed: {error}")
        return
    for name in SCHEMES[:3] if check.machine.smoke else SCHEMES:
        _attempt(check, name, partial(_compare, check, name))
    for name in ("MXFP4", "Q4_K")[: 1 if check.machine.smoke else 2]:
        _attempt(check, f"experts in {name}", partial(_compare_experts, check, name))
    _attempt(check, "1 row, layers of an 8B", partial(_time_layers, check))
    _attempt(check, "tiles", partial(_time_tiles, check))
    _attempt(check, "experts of 16 tokens", partial(_time_experts, check))
    check.machine.forget()


def launches(machine: Machine) -> Iterator[Callable[[], object]]:
    """What compiles the kernels that are compared and timed: each scheme with few rows, with more, and unpacked."""
    from engine.packed_triton.products import multiplied, unpacked

    dtype = _dtype(machine)
    for name in SCHEMES:
        planes = _planes(machine, name, 512, 512)
        for rows in ROWS[:3]:
            yield partial(multiplied, torch.zeros(rows, 512, dtype=dtype, device=machine.device), planes)
        yield partial(unpacked, planes, dtype)


def _dtype(machine: Machine) -> torch.dtype:
    return torch.float16 if machine.smoke else torch.bfloat16


def _planes(machine: Machine, name: str, outputs: int, inputs: int, seed: int = 0) -> Any:
    from engine.packed_triton.planes import planes_of

    planes = planes_of(random_blocks(name, outputs, inputs, seed=seed, device=machine.device), machine.device)
    assert planes is not None
    return planes


def _attempt(check: Check, name: str, work: Callable[[], None]) -> None:
    if not check.has_time(PART, name, 0.5):
        return
    try:
        work()
    except Exception as error:  # noqa: BLE001 - compilers and drivers may raise anything
        check.report.compared(PART, name, math.inf, 0.0, reason_of(error))
        check.machine.wait()  # raises where the device is lost


def _rows(machine: Machine, count: int, inputs: int) -> torch.Tensor:
    return machine.random(count, inputs).to(_dtype(machine))


def _compare(check: Check, name: str) -> None:
    """Products of few rows and of many, and rows of a table, against the numbers that the reference unpacks."""
    from engine.packed_triton.planes import planes_of
    from engine.packed_triton.products import PlanesProduct

    machine, dtype = check.machine, _dtype(check.machine)
    outputs, inputs = (48, 512) if machine.smoke else (1000, 2560)
    blocks = random_blocks(name, outputs, inputs, device=machine.device)
    planes = planes_of(blocks, machine.device)
    assert planes is not None
    product, weight = PlanesProduct(planes, dtype), blocks.unpacked(dtype)
    chosen = torch.arange(outputs, device=machine.device)[::7].contiguous()
    apart = max(difference(product.rows(chosen), weight[chosen]), difference(product.unpacked(dtype), weight))
    check.report.compared(PART, f"{name}, unpacked numbers", apart, ROUNDING[dtype])
    apart = 0.0
    for count in ROWS:
        rows = _rows(machine, count, inputs)
        apart = max(apart, difference(product(rows), functional.linear(rows, weight)))
    check.report.compared(PART, f"{name}, products", apart, REORDERED_SUMS[dtype])


def _compare_experts(check: Check, name: str) -> None:
    """The maps of experts in one recorded launch, against one expert after another."""
    from engine.packed_triton.grouped import PlanesStack
    from engine.packed_triton.planes import planes_of

    machine, dtype = check.machine, _dtype(check.machine)
    experts, of_a_token, (inputs, outputs), _ = SMOKE_EXPERTS if machine.smoke else EXPERTS
    blocks = random_blocks(name, experts, outputs, inputs, device=machine.device)
    planes = planes_of(blocks, machine.device)
    assert planes is not None
    stack, apart = PlanesStack(planes, experts, dtype), 0.0
    for tokens in (1, 40) if machine.smoke else (1, 16, 400):
        rows, places = _rows(machine, tokens, inputs), torch.randint(experts, (tokens * of_a_token,)).to(machine.device)
        found = torch.zeros(len(places), outputs, dtype=dtype, device=machine.device)

        def compute(rows: torch.Tensor = rows, places: torch.Tensor = places, found: torch.Tensor = found) -> None:
            found.copy_(stack(rows, stack.plan(places)))

        machine.recorded(compute)()
        for slot in range(0, len(places), 1 if tokens < 40 else 37):
            matrix = stack[int(places[slot])].unpacked(dtype)
            apart = max(apart, difference(found[slot], functional.linear(rows[slot // of_a_token], matrix)))
    check.report.compared(PART, f"experts in {name}, recorded", apart, REORDERED_SUMS[dtype])


def _time_layers(check: Check) -> None:
    """One row through the products of layers of an 8B, beside bfloat16's products over joined weights."""
    from engine.packed_triton.products import multiplied

    machine = check.machine
    layer, joined, layers = (SMOKE_LAYER, SMOKE_LAYER, 1) if machine.smoke else (LAYER, JOINED, LAYERS)
    rows = {inputs: _rows(machine, 1, inputs) for inputs, _ in layer}
    weights = [machine.random(outputs, inputs).to(_dtype(machine)) for _ in range(layers) for inputs, outputs in joined]
    plain = _seconds(check, [partial(functional.linear, rows[weight.shape[1]], weight) for weight in weights])
    size = sum(weight.nbytes for weight in weights)
    check.report.number(
        PART, "1 row, a layer in bfloat16", size / plain / 1e9, "GB/s", f"{plain / layers * 1e6:.1f} µs"
    )
    del weights
    for name, goal in TIMED.items():
        if not check.has_time(PART, f"1 row, a layer in {name}", 1.0):
            return
        planes = [_planes(machine, name, outputs, inputs, seed) for seed in range(layers) for inputs, outputs in layer]
        found = _seconds(check, [partial(multiplied, rows[each.columns], each) for each in planes])
        size = sum(each.nbytes for each in planes)
        note = f"{found / layers * 1e6:.1f} µs; {plain / found:.2f} times as fast as bfloat16"
        check.report.number(PART, f"1 row, a layer in {name}", size / found / 1e9, "GB/s", note)
        if goal is not None:
            check.report.share(goal, plain / found)
        del planes
        machine.forget()


def _time_tiles(check: Check) -> None:
    """Each tile of the table and those beside it, on the largest map of a layer; and torch with bfloat16."""
    from engine.packed_triton.products import multiplied
    from engine.packed_triton.tiles import OTHERS, TILES

    machine = check.machine
    inputs, outputs = (256, 64) if machine.smoke else (4096, 14336)
    planes = [_planes(machine, "Q4_K", outputs, inputs, seed) for seed in range(1 if machine.smoke else LAYERS)]
    for tile in TILES[:1] if machine.smoke else (*TILES, *OTHERS):
        for splits in (1, 2) if tile.rows == 16 else (1,):
            title = f"{tile.rows} rows, Q4_K {inputs} → {outputs}, {tile.channels} × {tile.groups} groups"
            title += f", {tile.warps} warps, {tile.stages} stages, {splits} splits"
            if not check.has_time(PART, title, 0.3):
                return
            rows = _rows(machine, tile.rows, inputs)
            found = _seconds(check, [partial(multiplied, rows, each, tile, splits) for each in planes]) / len(planes)
            check.report.number(PART, title, planes[0].nbytes / found / 1e9, "GB/s", f"{found * 1e6:.1f} µs")


def _time_experts(check: Check) -> None:
    """Both maps of the experts of 16 tokens, with the plan."""
    from engine.packed_triton.grouped import PlanesStack

    machine, dtype = check.machine, _dtype(check.machine)
    experts, of_a_token, *maps = SMOKE_EXPERTS if machine.smoke else EXPERTS
    stacks = [
        PlanesStack(_planes(machine, "MXFP4", experts * outputs, inputs), experts, dtype) for inputs, outputs in maps
    ]
    for tokens in (2,) if machine.smoke else (1, 16):
        places = torch.randint(experts, (tokens * of_a_token,)).to(machine.device)
        rows = [_rows(machine, count, inputs) for count, (inputs, _) in zip((tokens, len(places)), maps, strict=True)]

        def compute(places: torch.Tensor = places, rows: list[torch.Tensor] = rows) -> None:
            plan = stacks[0].plan(places)
            for stack, given in zip(stacks, rows, strict=True):
                stack(given, plan)

        found = _seconds(check, [compute])
        read = sum(stack.planes.nbytes for stack in stacks) * len(places.unique()) / experts
        title = f"experts of {tokens} tokens in MXFP4"
        check.report.number(PART, title, read / found / 1e9, "GB/s", f"{found * 1e6:.1f} µs")


def _seconds(check: Check, works: list[Callable[[], object]]) -> float:
    """Seconds of all of ``works``, recorded as one."""

    def compute() -> None:
        for work in works:
            work()

    return check.machine.device_seconds(check.machine.recorded(compute), 1 if check.machine.smoke else 4)
