"""The sampler of a GPU: the order and the numbers of ``engine.sampling``, as operations on tensors."""

from __future__ import annotations

from engine.sampling.device.device_sampler import DeviceSampler

__all__ = ["DeviceSampler"]
