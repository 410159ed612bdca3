"""Sets up torch's GPU allocator: expandable segments, which can be freed in parts, or fixed ones if not supported.

transformers allocates the memory of all weights in one piece. What joining weights frees lies within that piece, and
would be lost to the cache without ``expandable_segments``. torch is imported late, because it reads its settings then.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from engine.failures import first_line

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# The environment variables that configure torch's allocator: the current name and the older one, which wins.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_IN_PARTS, _WHOLE = "expandable_segments:True", "expandable_segments:False"


def take_memory_in_parts() -> None:
    """Have torch use expandable segments, unless the operator set it otherwise. Call before torch is imported."""
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = _IN_PARTS


def take_first_memory(device: torch.device) -> None:
    """Have torch allocate its first memory on a GPU; if expandable segments do not work there, switch them off.

    They need the driver's virtual memory management, which some virtual machines lack. Raises what torch raises if the
    GPU gives no memory at all.
    """
    import torch

    if device.type != "cuda":
        return
    try:
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        settings = next((os.environ[name] for name in SETTINGS if _IN_PARTS in os.environ.get(name, "")), None)
        if settings is None:
            raise
        reason = first_line(error)
        _log.warning("%s has no expandable segments, so the cache may be smaller (%s): %s", device, _WHOLE, reason)
        torch._C._accelerator_setAllocatorSettings(settings.replace(_IN_PARTS, _WHOLE))
        torch.empty(1, device=device)
