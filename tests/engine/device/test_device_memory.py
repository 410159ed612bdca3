"""What is said of a GPU's memory, on a machine without one: torch is made to say what a device says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from engine.api.errors import ModelRefused
from engine.device import device_memory
from engine.device.device_memory import (
    hold_bytes,
    idle_bytes,
    refused_without_memory,
    release_idle,
    size,
    who_holds,
)
from engine.device.shortage import ran_out, step_ran_out

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, 2 of them free; this process has taken 70 and uses 60."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 * GIB)


HOLDERS = (
    "of the 80.0 GiB on cuda:0, 2.0 GiB are free, 70.0 GiB are held by this model and 8.0 GiB by other processes and "
    "the driver"
)


@pytest.mark.usefixtures("card")
def test_who_holds_the_memory_of_a_gpu() -> None:
    assert who_holds(CUDA) == HOLDERS
    assert idle_bytes(CUDA) == 10 * GIB


def test_who_holds_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "available_bytes", lambda: 3 << 20)
    monkeypatch.setattr(device_memory, "total_bytes", lambda: 15 * GIB)
    assert who_holds(CPU) == "of 15.0 GiB for this process, 3.0 MiB are available"
    assert idle_bytes(CPU) == 0


def test_a_gpu_that_cannot_be_asked_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert who_holds(CUDA) == "the memory of cuda:0 cannot be read (CUDA error: out of memory)"


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(84_950_000_000, "79.1 GiB"), (3 << 19, "1.5 MiB"), (1024, "1.0 KiB"), (7, "7 bytes")]
)
def test_sizes_for_people(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("out of resource: shared memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_whoever_notices_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert ran_out(error) is expected


@pytest.mark.usefixtures("card")
def test_the_client_of_a_step_hears_the_numbers_and_what_to_do() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …")
    assert str(step_ran_out(error, who_holds(CUDA))) == (
        f"Memory ran out while this request was computed: 2.50 GiB were wanted; {HOLDERS}. Send a shorter prompt, or "
        "have the operator lower kv_memory or max_running."
    )
    assert str(step_ran_out(MemoryError(), who_holds(CUDA))).startswith(
        "Memory ran out while this request was computed: of the 80.0 GiB on cuda:0"
    )


@pytest.mark.usefixtures("card")
def test_only_what_ran_out_of_memory_is_refused_for_it() -> None:
    with (
        pytest.raises(ModelRefused, match=rf"^there is not enough memory for a lot: {HOLDERS}; end the other$"),
        refused_without_memory("a lot", CUDA, "end the other"),
    ):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="shapes"), refused_without_memory("a lot", CUDA, "end the other"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(ModelRefused, match="as it was"), refused_without_memory("a lot", CUDA, "end the other"):
        raise ModelRefused("as it was")


def test_memory_is_held_and_given_back_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[object] = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: did.append((size, dtype, device)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("gave back"))
    for device in (CPU, CUDA):
        hold_bytes(device, 500)
        hold_bytes(device, -1)
        release_idle(device)
    assert did == [(500, torch.uint8, CUDA), "gave back"]


def test_a_folder_is_no_memory() -> None:
    with pytest.raises(FileNotFoundError), refused_without_memory("a file", CPU, "make it"):
        Path("/nonexistent").read_bytes()
