"""Who holds which slot of recurrent states: running sequences, and snapshots that others may begin with. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain


class StateSlots:
    """``num_running`` slots for running sequences, and after them ``num_snapshots`` for copies of their states.

    A snapshot is known by the key of a block (``BlockPool``): it is what a sequence carries after the
    tokens up to that block's end. Where all slots for snapshots are taken, the one that was found or kept least
    recently is given up.
    """

    def __init__(self, num_running: int, num_snapshots: int) -> None:
        self.num_running = num_running
        self.num_snapshots = num_snapshots
        self._free = list(range(num_running - 1, -1, -1))
        self._free_snapshots = list(range(num_running + num_snapshots - 1, num_running - 1, -1))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()  # the slot by the block's key

    @property
    def num_used(self) -> int:
        """Slots that sequences hold."""
        return self.num_running - len(self._free)

    @property
    def num_kept(self) -> int:
        """Snapshots that can be found."""
        return len(self._snapshots)

    def take(self) -> int:
        """A slot for a sequence that starts; there is one for each that may run."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The end of what ``take`` gave."""
        self._free.append(slot)

    def find(self, key: bytes) -> int | None:
        """The slot of a snapshot; it counts as used now."""
        if key not in self._snapshots:
            return None
        self._snapshots.move_to_end(key)
        return self._snapshots[key]

    def reserve(self) -> int | None:
        """A slot for a snapshot that is to be computed; ``keep`` or ``drop`` follows. None where all are reserved."""
        if self._free_snapshots:
            return self._free_snapshots.pop()
        return self._snapshots.popitem(last=False)[1] if self._snapshots else None

    def keep(self, key: bytes, slot: int) -> None:
        """The reserved ``slot`` holds the states of a block; of two for the same content the first one stays."""
        if key in self._snapshots:
            self.drop(slot)
        else:
            self._snapshots[key] = slot

    def drop(self, slot: int) -> None:
        """The reserved ``slot`` is not needed."""
        self._free_snapshots.append(slot)

    def forget(self, key: bytes) -> None:
        """The content of a block is no longer indexed; its snapshot, if there is one, goes with it."""
        slot = self._snapshots.pop(key, None)
        if slot is not None:
            self._free_snapshots.append(slot)

    def check(self, held: Iterable[int], reserved: Iterable[int]) -> None:
        """Assert that every slot is in one place; ``held`` are of sequences, ``reserved`` of snapshots to come."""
        working, coming = sorted(chain(self._free, held)), [*self._free_snapshots, *reserved]
        assert working == list(range(self.num_running)), "a slot of a sequence is lost or in two places"
        taken = sorted([*coming, *self._snapshots.values()])
        expected = range(self.num_running, self.num_running + self.num_snapshots)
        assert taken == list(expected), "a slot of a snapshot is lost or in two places"

    @property
    def keys(self) -> Iterable[bytes]:
        """The blocks that have a snapshot."""
        return self._snapshots.keys()
