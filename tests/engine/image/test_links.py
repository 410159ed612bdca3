"""Structures that point to each other, as bytes that can lie anywhere."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from engine.image.links import Region, link, relink


class Leaf(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int32), ("values", ctypes.POINTER(ctypes.c_float)), ("absent", ctypes.c_void_p))


class Root(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_int32),
        ("leaves", ctypes.POINTER(Leaf)),
        ("inside", Leaf * 2),
        ("addresses", ctypes.POINTER(ctypes.c_void_p)),
    )


def floats(tensor: torch.Tensor) -> object:
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))


def moved(root: Root, kept: list[object], others: list[Region], segments: list[int]) -> tuple[Root, np.ndarray]:
    linked = link(root, kept, others)
    data = np.frombuffer(bytearray(b"".join(linked.chunks())), np.uint8)
    relink(data, linked.pointers, segments)
    return Root.from_buffer(data.data), data


def test_what_was_moved_leads_to_its_own_numbers_and_to_the_new_places_of_others() -> None:
    own, elsewhere, place = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7.0] * 8), torch.tensor([8.0] * 40)
    leaves = (Leaf * 3)(*(Leaf(number, floats(own)) for number in range(3)))
    addresses = (ctypes.c_void_p * 2)(elsewhere.data_ptr() + 8, own.data_ptr() + 4)
    inside = Leaf(9, floats(elsewhere)), Leaf(5, floats(own))
    root = Root(
        3, ctypes.cast(leaves, ctypes.POINTER(Leaf)), inside, ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
    )
    region = Region(elsewhere.data_ptr(), elsewhere.nbytes, 1, 16)
    found, data = moved(root, [leaves, own, addresses, own, "what is no memory"], [region], [0, place.data_ptr()])
    own.fill_(0)
    leaves[1].number = 77
    assert (found.size, [leaf.number for leaf in found.leaves[:3]]) == (3, [0, 1, 2])
    assert found.leaves[2].values[:3] == [1.0, 2.0, 3.0]
    assert found.leaves[2].absent is None
    assert (found.inside[0].values[0], found.inside[1].values[2]) == (8.0, 3.0)
    assert found.addresses[0] == place.data_ptr() + 24
    assert ctypes.cast(found.addresses[1], ctypes.POINTER(ctypes.c_float))[0] == 2.0
    assert data.ctypes.data <= (found.addresses[1] or 0) < data.ctypes.data + len(data)


def test_a_pointer_to_what_is_not_kept_is_refused() -> None:
    lost, kept = torch.ones(4), torch.ones(4)
    for address in (lost.data_ptr(), kept.data_ptr() + kept.nbytes):
        root = Root(1, None, (), ctypes.cast((ctypes.c_void_p * 1)(), ctypes.POINTER(ctypes.c_void_p)))
        root.inside[0].absent = address
        root.addresses = None
        with pytest.raises(ValueError, match="leads to nothing that is kept"):
            link(root, [kept], [])
