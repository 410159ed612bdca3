"""A GPU that is lost, on a machine without one: torch is made to say so."""

from __future__ import annotations

import pytest
import torch

from engine.api.errors import EngineUnavailable
from engine.device.cuda_health import require_device

CUDA = torch.device("cuda", 0)


def test_a_cpu_is_never_lost() -> None:
    require_device(torch.device("cpu"))


def test_a_gpu_is_waited_for_and_said_to_be_lost_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    require_device(CUDA)
    assert waited == [CUDA]

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(EngineUnavailable, match=r"^the device cuda:0 is lost: .*illegal memory access.*; where a"):
        require_device(CUDA)
