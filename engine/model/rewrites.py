"""Replaces parts of a loaded model by faster stand-ins: each is found, proven equal on random numbers, then swapped in.

What cannot be proven equal stays the model's own code: it is slower, never wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from engine.closeness import Tolerance
from engine.device.cuda_health import DeviceError, device_errors
from engine.model.loader import LoadedModel

_log = logging.getLogger(__name__)


class Rewrite(Protocol):
    """One kind of replacement. It defines what its places and stand-ins are."""

    name: str
    """What is replaced, in the plural, for the log."""
    tolerance: Tolerance

    def find(self, model: LoadedModel) -> list[Any]:
        """The places that have the structure. ``model`` is bound to no attention backend yet."""
        ...

    def stand_ins(self, place: Any) -> Sequence[Any]:
        """What may replace a place; the one closest to the model's own numbers is taken."""
        ...

    def compare(self, place: Any, stand_in: Any) -> tuple[float, torch.dtype]:
        """How far apart both are on random numbers (``difference``), and the type that they were computed in."""
        ...

    def swap(self, place: Any, stand_in: Any) -> None:
        """Put the stand-in in its place."""
        ...


def apply_rewrites(model: LoadedModel, rewrites: Iterable[Rewrite]) -> int:
    """Replace what can be replaced; returns the number of places. The log says what stays as it was, and why.

    Kernels that do not run here end the rewrites, because those that follow would fail too. Raises
    ``torch.OutOfMemoryError``, and ``EngineUnavailable`` if the device is lost.
    """
    swapped = 0
    for rewrite in rewrites:
        try:
            with device_errors(model.module.device):
                swapped += _apply(model, rewrite)
        except DeviceError as error:
            _log.warning("The %s are not fused: %s", rewrite.name, error)
            break
    return swapped


def _apply(model: LoadedModel, rewrite: Rewrite) -> int:
    places = rewrite.find(model)
    total, swapped, reason = len(places), 0, ""
    while places:
        # Popped, so that replaced weights are freed one by one: keeping all places would hold all weights twice.
        place = places.pop()
        compared = [(*rewrite.compare(place, stand_in), stand_in) for stand_in in rewrite.stand_ins(place)]
        apart, dtype, stand_in = min(compared, key=lambda one: one[0])
        limit = rewrite.tolerance.get(dtype, 0.0)
        if apart <= limit:
            rewrite.swap(place, stand_in)
            swapped += 1
        else:
            reason = f"a stand-in differs by {apart:.1e} of the largest number; rounding explains {limit:.0e}"
    _log.info("%d of %d %s are fused", swapped, total, rewrite.name)
    if reason:
        _log.warning("%d of the %s are not fused: %s", total - swapped, rewrite.name, reason)
    return swapped
