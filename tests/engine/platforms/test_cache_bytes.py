"""How much memory each platform gives the cache: bytes, a share or the default."""

from __future__ import annotations

import pytest
import torch

from engine.api.errors import ModelRefused
from engine.platforms import cuda, machine
from engine.platforms.cpu import CpuPlatform
from engine.platforms.cuda import CudaPlatform
from engine.platforms.machine import CACHE_LIMIT_BYTES


def test_a_cpu_gives_bytes_a_share_or_the_default() -> None:
    platform = CpuPlatform()
    assert platform.cache_bytes(5e6, 0) == 5_000_000
    assert 0 < platform.cache_bytes(None, 0) <= CACHE_LIMIT_BYTES
    assert platform.cache_bytes(0.001, 0) < platform.cache_bytes(0.9, 0)


def test_a_cpu_gives_a_quarter_and_takes_only_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    assert CpuPlatform().cache_bytes(None, 200) == 200
    assert CpuPlatform().cache_bytes(0.5, 200) == 400
    assert CpuPlatform().cache_bytes(5000.0, 200) == 5000


def test_more_bytes_than_a_gpu_has_left_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(cuda, "who_holds", lambda device: f"others hold {device}")
    platform = CudaPlatform(torch.device("cuda", 0))
    assert platform.cache_bytes(800.0, 200) == 800
    with pytest.raises(
        ModelRefused,
        match=r"kv_memory is 801 bytes, but 800 are free on cuda:0 .* 200 for steps \(others hold cuda:0\); lower it",
    ):
        platform.cache_bytes(801.0, 200)
    assert platform.cache_bytes(0.5, 200) == 400
    assert platform.cache_bytes(1.0, 200) == 800
    assert platform.cache_bytes(None, 200) == 736


def test_a_gpu_that_others_fill_is_refused_with_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    for kv_memory in (None, 0.5, 1e9):
        with pytest.raises(
            ModelRefused,
            match=r"no memory is left for a KV cache: the largest steps take 1.5 GiB, and of the 80.0 GiB on cuda:0, "
            r"1.0 GiB are free, 2.0 GiB are held by this model and 77.0 GiB by other processes .* kv_memory each",
        ):
            CudaPlatform(torch.device("cuda", 0)).cache_bytes(kv_memory, 3 << 29)
