"""How much memory each platform gives the cache: bytes, a share or the default."""

from __future__ import annotations

import pytest
import torch

from engine.api.errors import ModelRefused
from engine.platforms import cpu, cuda
from engine.platforms.cpu import CACHE_LIMIT_BYTES, CpuPlatform
from engine.platforms.cuda import CudaPlatform


def test_a_cpu_gives_bytes_a_share_or_the_default() -> None:
    platform = CpuPlatform()
    assert platform.cache_bytes(5e6, 0) == 5_000_000
    assert 0 < platform.cache_bytes(None, 0) <= CACHE_LIMIT_BYTES
    assert platform.cache_bytes(0.001, 0) < platform.cache_bytes(0.9, 0)


def test_a_cpu_gives_a_quarter_and_takes_only_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_bytes", lambda: 1000)
    assert CpuPlatform().cache_bytes(None, 200) == 200
    assert CpuPlatform().cache_bytes(0.5, 200) == 400
    assert CpuPlatform().cache_bytes(5000.0, 200) == 5000


def test_more_bytes_than_a_gpu_has_left_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "free_bytes", lambda device: 1000)
    platform = CudaPlatform(torch.device("cuda", 0))
    assert platform.cache_bytes(800.0, 200) == 800
    with pytest.raises(ModelRefused, match=r"kv_memory is 801 bytes, but 800 are free on cuda:0 .* 200 for steps"):
        platform.cache_bytes(801.0, 200)
    assert platform.cache_bytes(0.5, 200) == 400
    assert platform.cache_bytes(1.0, 200) == 800
    assert platform.cache_bytes(None, 200) == 736
