"""A recurrent layer beside a full-attention layer on a CPU: one token of many sequences each, by torch and in C.

    echo '{"sequences": [1, 16], "context": 1024, "rounds": 30}' | python benchmarks/recurrent_layers.py

The layers are transformers' own, with random weights and the sizes that the makers of the models published. Prints one
line of JSON for each family and number of sequences: milliseconds a token step, medians over rounds in which the three
take turns, and the time of the C operators as a share of that of the full-attention layer, whose ``context`` tokens are
cached.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache
from engine.model import attention_hook
from engine.model.loader import LoadedModel
from engine.model.probe import probe
from engine.native.library import load_library
from engine.native.states import NativeStates
from engine.recurrent import mixer_hook
from engine.recurrent.states import RecurrentStates
from engine.scheduling.flat_batch import FlatBatch, GroupBlocks

BLOCK_SIZE = 16
FAMILIES: dict[str, dict[str, Any]] = {
    # Qwen3.5 4B
    "qwen3_5_text": {
        "hidden_size": 2560,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    # LFM2 1.2B
    "lfm2": {
        "hidden_size": 2048,
        "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    # Granite 4.0 H Tiny
    "granitemoehybrid": {
        "hidden_size": 1536,
        "layer_types": ["mamba", "attention"],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
    },
}


class Layers:
    """One recurrent and one full-attention layer, and a step of decodes for both."""

    def __init__(self, family: str, sequences: int, context: int, code: Any) -> None:
        config = CONFIG_MAPPING[family](
            **{"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64}
            | FAMILIES[family]
        )
        attention_hook.register()
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        probed = probe(self.model, config)
        self.loaded = LoadedModel(self.model, probed, context, "", ())
        (self.mixer,), (attending,) = probed.mixers, probed.layers
        self.attending = attending.module
        self.hidden = torch.randn(1, sequences, config.hidden_size)
        self.states = [
            make(StateCache(probed.states, sequences, torch.device("cpu")))
            for make in (RecurrentStates, lambda cache: NativeStates(cache, code, torch.get_num_threads()))
        ]
        blocks = context // BLOCK_SIZE
        cache = KVCache(
            [attending.shape], sequences * blocks, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu")
        )
        for kept in (*cache.keys, *cache.values):
            kept.normal_()
        attention = ReferenceAttention(cache)
        attention_hook.bind(self.attending, attention_hook.PagedLayer(attention, 0))
        ones = array("i", [1]) * sequences
        starts = array("i", [context - 1]) * sequences
        groups = GroupBlocks(
            array("i", range(sequences * blocks)),
            array("i", range(0, sequences * blocks, blocks)),
            BLOCK_SIZE,
            starts,
            ones,
        )
        places = array("i", range(sequences))
        batch = FlatBatch(array("i", [5]) * sequences, starts, places, ones, array("i"), (groups,), state_slots=places)
        attention.prepare(batch)
        for states in self.states:
            states.prepare(batch)
        rotary = getattr(self.model.model, "rotary_emb", None)
        positions = torch.full((1, sequences), context - 1)
        self.rotation = None if rotary is None else rotary(self.hidden, positions)

    def recurrent(self, which: int) -> object:
        """The recurrent layer by torch (0) or in C (1)."""
        mixer_hook.bind(self.mixer.module, mixer_hook.SlottedMixer(self.states[which], 0))
        return self.mixer.module(self.hidden)

    def attention(self) -> object:
        """The full-attention layer over its whole context."""
        return self.attending(self.hidden, position_embeddings=self.rotation, attention_mask=None)


def measure(family: str, sequences: int, context: int, rounds: int, code: Any) -> dict[str, Any]:
    """Milliseconds of each kind of layer: medians of rounds in which they take turns."""
    layers = Layers(family, sequences, context, code)
    kinds: dict[str, Callable[[], object]] = {
        "torch": lambda: layers.recurrent(0),
        "c": lambda: layers.recurrent(1),
        "attention": layers.attention,
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for _ in range(rounds + 2):  # the first two warm up
            for name, compute in kinds.items():
                begun = time.perf_counter()
                compute()
                taken[name].append((time.perf_counter() - begun) * 1000)
    medians = {name: statistics.median(numbers[2:]) for name, numbers in taken.items()}
    return {
        "family": family,
        "sequences": sequences,
        "context": context,
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "c_of_attention": round(medians["c"] / medians["attention"], 3),
        "c_of_torch": round(medians["c"] / medians["torch"], 3),
    }


def main() -> None:
    asked = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        code = load_library(Path(folder))
        for family in asked.get("families", FAMILIES):
            for sequences in asked["sequences"]:
                print(json.dumps(measure(family, sequences, asked["context"], asked["rounds"], code)), flush=True)


if __name__ == "__main__":
    main()
