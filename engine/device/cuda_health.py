"""The state of a GPU: whether it is lost, and what a failed kernel means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.api.errors import EngineError, EngineUnavailable
from engine.failures import first_line, sentence


class DeviceError(Exception):
    """Code for the device failed, and a slower way may be tried; the message is one line, ``cause`` is the error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(sentence(cause))
        self.cause = cause


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Raise ``DeviceError`` for whatever compilers, drivers and kernels raise while a model is loaded.

    The one broad ``except`` of loading: what they raise cannot be listed without each of them at hand, and a kernel
    that does not run must not keep a model from being served. Errors of the engine and
    ``torch.OutOfMemoryError`` are passed on: no slower way would avoid them. Raises ``EngineUnavailable`` if the
    device is lost.
    """
    try:
        yield
    except (EngineError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        require_device(device)
        raise DeviceError(error) from error


def require_device(device: torch.device) -> None:
    """Wait for a GPU's pending work. Raises ``EngineUnavailable`` if it is lost; a CPU never is.

    A bad address in a kernel or a hardware fault makes every later call of this process fail too, whatever it does. The
    first error may itself have been reported on an unrelated later call.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise EngineUnavailable(
            f"the device {device} is lost: {first_line(error)}; where a new process does not find it either, reset it "
            "(nvidia-smi --gpu-reset) or restart the machine"
        ) from error
