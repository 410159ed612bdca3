"""One token at a time gives what transformers' operators give for all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from engine.closeness import difference
from engine.recurrent.recurrences import RECURRENCES, advance

TOKENS = 9


def delta(gates: tuple[int, ...]) -> dict[str, Any]:
    return {
        "query": torch.randn(2, TOKENS, 2, 6),
        "key": torch.randn(2, TOKENS, 2, 6),
        "value": torch.randn(2, TOKENS, 2 if gates else 4, 5),
        "beta": torch.rand(2, TOKENS, 2 if gates else 4),
        "g": -torch.rand(2, TOKENS, 2 if gates else 4, *gates),
        "use_qk_l2norm_in_kernel": True,
    }


def mamba2(dt_limit: tuple[float, float]) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, TOKENS, 4, 5),
        "dt": torch.randn(2, TOKENS, 4),
        "A": -torch.rand(4),
        "B": torch.randn(2, TOKENS, 2, 6),
        "C": torch.randn(2, TOKENS, 2, 6),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
        "dt_softplus": True,
        "dt_limit": dt_limit,
        "chunk_size": 4,
    }


CASES = {
    "gated delta": (qwen, "torch_chunk_gated_delta_rule", delta(())),
    "gates by channel": (kimi, "chunk_kimi_delta_attention", delta((6,))),
    "mamba 2": (granite, "mamba2_chunk_scan", mamba2((0.0, float("inf")))),
    "mamba 2 with bounded steps": (granite, "mamba2_chunk_scan", mamba2((0.4, 0.9))),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_operator(case: str) -> None:
    module, name, arguments = CASES[case]
    recurrence = RECURRENCES[name]
    expected, last = getattr(module, name)(**{**arguments, recurrence.initial: None, recurrence.final: True})
    state = torch.zeros_like(last)
    for token in range(TOKENS):
        taken = {name: arguments[name][:, token] for name in recurrence.by_token}
        found = advance(recurrence.inputs({**arguments, **taken}), state)
        assert difference(found, expected[:, token]) < 1e-5
    assert difference(state, last) < 1e-5
