"""What only a GPU can do: be lost, and have memory that is taken and used by nobody."""

from __future__ import annotations

import torch

from engine.api.errors import EngineUnavailable


def require_device(device: torch.device) -> None:
    """Wait for what a GPU has to do. Raises ``EngineUnavailable`` if it is lost; a CPU never is.

    A bad address in a kernel or a fault of the hardware makes every later call of this process fail too, whatever it
    asks for, and also where the first error was told as that of an innocent call.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EngineUnavailable(f"the device {device} is lost: {reason}") from error


def idle_bytes(device: torch.device) -> int:
    """What torch has taken of a GPU's memory and not given to any tensor; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_reserved(device)) - int(torch.cuda.memory_allocated(device))
