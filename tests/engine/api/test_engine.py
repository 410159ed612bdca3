"""What an engine may be started with."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import msgspec
import pytest

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("block_size", 0, "1 or more"),
        ("max_running", 0, "1 or more"),
        ("max_waiting", -1, "0 or more"),
        ("threads", 0, "1 or more"),
        ("step_target_ms", 0.0, "above 0"),
        ("step_target_ms", nan, "above 0"),
        ("kv_memory", 0.0, "a share above 0 and up to 1, or bytes"),
        ("kv_memory", -1.0, "a share above 0 and up to 1, or bytes"),
        ("kv_memory", nan, "a share above 0 and up to 1, or bytes"),
        ("kv_memory", inf, "a share above 0 and up to 1, or bytes"),
    ],
)
def test_a_number_outside_its_bounds_is_refused_by_name(field: str, value: float, limit: str) -> None:
    with pytest.raises(ModelRefused, match=rf"^{field} is {value}; give .*{limit}$"):
        replace(EngineConfig("folder"), **{field: value})


def test_types_of_keys_and_values_are_named() -> None:
    with pytest.raises(ModelRefused, match=r"^kv_dtype is 'int8'; give auto or fp8$"):
        EngineConfig("folder", kv_dtype="int8")


def test_numbers_at_their_bounds_are_taken() -> None:
    config = EngineConfig(
        "folder", block_size=1, max_running=1, max_waiting=0, threads=1, step_target_ms=1e-6, kv_memory=1.0
    )
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
