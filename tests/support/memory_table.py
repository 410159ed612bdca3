"""What one sequence of the models that people run takes in memory: found by a dry run of their published
configurations, and in the words of docs/memory.md."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.fates import Fate, find_fate

from engine.cache import layout
from engine.cache.layout import block_bytes, group_demands
from engine.cache.state_tensors import slot_bytes
from engine.model.config_file import read_config
from engine.model.eligibility import require_eligible
from engine.model.probe import Probe
from engine.model.rehearsal import rehearse

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
PAGE = ROOT / "docs" / "memory.md"
MARK = "<!-- From here on written by scripts/memory-table. -->\n"

FAMILIES: dict[str, tuple[str, ...]] = {
    "Qwen3.5, 3.6, 3.8 dense": ("Qwen3.5-27B",),
    "Qwen3.5, 3.6 with experts": ("Qwen3.6-35B-A3B",),
    "Gemma 4 E2B, E4B": ("gemma-4-E2B-it", "gemma-4-E4B-it"),
    "Gemma 4 26B-A4B, 31B": ("gemma-4-26B-A4B-it", "gemma-4-31B-it"),
    "Gemma 4 12B": ("gemma-4-12B-it",),
    "gpt-oss": ("gpt-oss-20b",),
    "Muse-Glimmer": ("Muse-Glimmer-30B",),
    "Qwen3 with experts": ("Qwen3-30B-A3B",),
    "Qwen3": ("Qwen3-0.6B", "Qwen3-8B"),
    "Qwen3-Next, Qwen3-Coder-Next": ("Qwen3-Next-80B-A3B-Instruct",),
    "Qwen3-VL": ("Qwen3-VL-8B-Instruct",),
    "Qwen2.5-VL": ("Qwen2.5-VL-7B-Instruct",),
    "Gemma 3": ("gemma-3-4b-it", "gemma-3-12b-it"),
    "Llama 3": ("Llama-3.1-8B",),
    "Mistral Small 3, Devstral": ("Mistral-Small-3.2-24B-Instruct-2506",),
    "Mistral Small 4": ("Mistral-Small-4-119B-2603",),
    "GLM-4.7-Flash": ("GLM-4.7-Flash",),
    "Nemotron 3": ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",),
    "LFM2.5": ("LFM2.5-1.2B-Instruct", "LFM2.5-8B-A1B"),
    "Granite 4 H and dense": ("granite-4.0-h-tiny", "granite-4.0-micro"),
    "Phi-4": ("phi-4",),
    "SmolLM3, OLMo 3, Seed-OSS, EXAONE 4": (
        "SmolLM3-3B",
        "Olmo-3-7B-Instruct",
        "Seed-OSS-36B-Instruct",
        "EXAONE-4.0-32B",
    ),
    "DeepSeek-R1 distills": ("DeepSeek-R1-Distill-Qwen-7B",),
}
"""The models that people run on machines of their own in 2026, and configurations of them in tests/data/configs."""
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one model: how many layers of each kind it has, the bytes that a token leaves behind in layers of full
    attention and, while it is within the window, in layers with one, and the bytes of the states of a sequence.
    ``sequences`` are the bytes of sequences of 8 and 32 thousand tokens."""

    name: str
    class_name: str
    layers: tuple[tuple[str, int], ...]
    full: int
    window: int
    states: int
    sequences: tuple[int, int]


def published(name: str) -> dict[str, Any]:
    """The configuration of a published model, as a JSON object; without what says how its weights are quantised."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    found.pop("quantization_config", None)
    return found


def find_memory(name: str) -> Memory:
    """Rehearse the model with weights in bfloat16. Raises ``ModelRefused`` where it cannot be served."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(published(name)))
        config = read_config(Path(folder))
    require_eligible(config)
    rehearsed = rehearse(config, DTYPE)
    assert rehearsed.probe is not None, f"{name}: {rehearsed.undecided}"
    probe = rehearsed.probe
    return Memory(
        name,
        type(rehearsed.model).__name__,
        _kinds(probe),
        token_bytes(probe, windowed=False),
        token_bytes(probe, windowed=True),
        slot_bytes(probe.states),
        (sequence_bytes(probe, 8 * KIB), sequence_bytes(probe, 32 * KIB)),
    )


def small_copy(name: str) -> Fate:
    """What becomes of a small copy of the model, served and compared with a plain forward."""
    config = published(name)
    (class_name,) = config.pop("architectures")
    del config["model_type"]
    return find_fate(class_name, config)


def token_bytes(probe: Probe, *, windowed: bool) -> int:
    """Keys and values of a token in the layers that have a window, or in those that have none."""
    shapes = [layer.shape for layer in probe.layers if layer.writes and (layer.window is not None) == windowed]
    return block_bytes(shapes, BLOCK_SIZE, DTYPE) // BLOCK_SIZE


def sequence_bytes(probe: Probe, tokens: int) -> int:
    """All that a sequence of so many tokens holds once they are computed: its blocks, and its slot of states."""
    grouped = probe.grouped(tokens)
    demands = group_demands(grouped.shapes, grouped.windows, BLOCK_SIZE, DTYPE)
    return layout.sequence_bytes(demands, tokens, BLOCK_SIZE) + slot_bytes(probe.states)


def _kinds(probe: Probe) -> tuple[tuple[str, int], ...]:
    counted = Counter(
        str(layer.window).replace("sliding ", "")
        if layer.window
        else "latent"
        if layer.shape.values_in_keys
        else "full"
        for layer in probe.layers
    )
    counted.update("recurrent" for _ in probe.mixers)
    return tuple(sorted(counted.items()))


# --- The page ------------------------------------------------------------------------------------


def table(found: Iterable[Memory], small: dict[str, str]) -> str:
    """Everything below the mark. ``small`` says of each model by what a small copy of it is computed."""
    families = {name: family for family, names in FAMILIES.items() for name in names}
    lines = ["", "| models | configuration | class | layers | full or latent: bytes a token | window: bytes a token |"]
    lines[-1] += " states of a sequence | 8k tokens | 32k tokens | small copy |"
    lines += ["| --- | --- | --- | --- | --: | --: | --: | --: | --: | --- |"]
    lines += [row(families[memory.name], memory, small[memory.name]) for memory in found]
    return "\n".join(lines) + "\n"


def row(family: str, memory: Memory, small: str) -> str:
    """One line of the table."""
    cells = [family, memory.name, memory.class_name, ", ".join(f"{count} {kind}" for kind, count in memory.layers)]
    cells += [f"{memory.full:,}", f"{memory.window:,}", _size(memory.states), *map(_size, memory.sequences), small]
    return f"| {' | '.join(cells)} |"


def rows_of_the_page() -> dict[str, str]:
    """The lines of the table in docs/memory.md, by the names of the configurations."""
    _, _, below = PAGE.read_text("utf-8").partition(MARK)
    return {line.split(" | ")[1]: line for line in re.findall(r"^\| .*", below, re.MULTILINE)[2:]}


def _size(number: int) -> str:
    if not number:
        return "0"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"
