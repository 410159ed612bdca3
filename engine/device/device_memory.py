"""The memory of a device: how much there is and who holds it, and what to say when it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.api.errors import ModelRefused
from engine.api.units import size as size  # what follows says it of memory
from engine.device.machine_memory import available_bytes, total_bytes
from engine.device.shortage import of_the_machine, ran_out
from engine.failures import first_line


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on the device, or for a CPU from the system within the limits of this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def held_bytes(device: torch.device) -> int:
    """GPU memory that torch has taken from the device, in use or not; 0 on a CPU."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def idle_bytes(device: torch.device) -> int:
    """GPU memory that torch has taken but no tensor uses; 0 on a CPU."""
    return held_bytes(device) - int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def all_bytes(device: torch.device) -> int:
    """The size of a GPU's memory, or what this process may use of the machine's."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else total_bytes()


def who_holds(device: torch.device) -> str:
    """How much memory there is and who holds it, as a clause that follows a colon. Never raises.

    What a GPU's driver holds for this process counts as held by others: about half a GiB.
    """
    try:
        free, total, ours = free_bytes(device), all_bytes(device), held_bytes(device)
    except RuntimeError as error:
        return f"the memory of {device} cannot be read ({first_line(error)})"
    if device.type != "cuda":
        return of_the_machine(free, total)
    others = max(0, total - free - ours)
    return (
        f"of the {size(total)} on {device}, {size(free)} are free, {size(ours)} are held by this model and "
        f"{size(others)} by other processes and the driver"
    )


def advice_on(device: torch.device) -> str:
    """What an operator can do where a model does not fit beside what else is there."""
    if device.type != "cuda":
        return "free memory, or serve a smaller model"
    return f"end what else uses {device}, set device to another GPU, or serve a smaller model"


@contextmanager
def refused_without_memory(purpose: str, device: torch.device, advice: str) -> Iterator[None]:
    """Raise ``ModelRefused`` if memory runs out: loading again would find no more."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise ModelRefused(f"there is not enough memory for {purpose}: {who_holds(device)}; {advice}") from error


def hold_bytes(device: torch.device, num_bytes: int) -> None:
    """Have torch take memory of a GPU and keep it for later tensors, so that no other process can take it."""
    if device.type == "cuda" and num_bytes > 0:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


def release_idle(device: torch.device) -> None:
    """Give back what torch holds of a GPU and no tensor uses. What a driver lacks may be just that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
