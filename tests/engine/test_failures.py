"""Which failures of loading may pass by themselves, and so are worth another start."""

from __future__ import annotations

import errno

import pytest

from engine.api.errors import EngineUnavailable, ModelRefused
from engine.failures import may_pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EIO, "Input/output error"),
        OSError("no space left on device"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("can't start new thread"),
        EngineUnavailable("the device cuda:0 is lost"),
    ],
)
def test_memory_devices_and_disks_come_back(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("vocab"),
        ValueError("the device map names no layer"),
        RuntimeError("size mismatch for lm_head.weight"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "tokenizer.json"),
        PermissionError(errno.EACCES, "Permission denied", "model.safetensors"),
        ModelRefused("layer 7 keeps a state"),
        AssertionError(),
    ],
)
def test_files_and_code_stay_as_they_are(error: Exception) -> None:
    assert not may_pass(error)
