"""How torch takes memory of a GPU, on a machine without one: torch is made to say what a device says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from engine.device.allocator import SETTINGS, take_first_memory, take_memory_in_parts

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_settings_of_the_operator_stand(
    settings: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    take_memory_in_parts()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


class GivesOnlyWhole:
    """Stands in for torch over a GPU whose driver has no management of virtual memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, works_whole: bool = True) -> None:
        self.asked = 0
        self.settings: list[str] = []
        self._works_whole = works_whole
        monkeypatch.setattr(torch, "empty", self._empty)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append)

    def _empty(self, size: int, device: torch.device) -> None:
        assert (size, device) == (1, CUDA)
        self.asked += 1
        if not self.settings or not self._works_whole:
            raise RuntimeError("CUDA driver error: operation not supported\nmore")


def test_memory_is_taken_whole_where_it_is_not_given_in_parts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    device = GivesOnlyWhole(monkeypatch)
    take_first_memory(torch.device("cpu"))
    assert device.asked == 0
    take_first_memory(CUDA)
    assert device.settings == ["max_split_size_mb:64,expandable_segments:False"]
    take_first_memory(CUDA)  # what works is left as it is
    assert len(device.settings) == 1
    (record,) = caplog.records
    assert record.getMessage().endswith("(expandable_segments:False): CUDA driver error: operation not supported")


def test_a_gpu_that_gives_no_memory_at_all_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = GivesOnlyWhole(monkeypatch, works_whole=False)
    with pytest.raises(RuntimeError, match="not supported"):
        take_first_memory(CUDA)
    assert (device.asked, len(device.settings)) == (2, 1)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    with pytest.raises(RuntimeError, match="not supported"):
        take_first_memory(CUDA)
    assert (device.asked, len(device.settings)) == (3, 1)


def test_memory_that_ran_out_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_size: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError(f"{device} is full")

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch, "empty", run_out)
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    with pytest.raises(torch.OutOfMemoryError):
        take_first_memory(CUDA)


def test_torch_takes_such_settings_while_it_runs() -> None:
    code = "import torch; torch._C._accelerator_setAllocatorSettings('expandable_segments:False')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
