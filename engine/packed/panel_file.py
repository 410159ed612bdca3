"""The panels of a model's matrices in one file of the cache: made at a first start, mapped by later ones.

Rearranging a matrix takes longer than reading it. What is mapped is also shared by all processes that serve the model,
and its pages can be dropped and read again, which memory of a process cannot. The file takes the room of the blocks.

The panels come first, each at an offset that suits vectors, then an index in JSON and its length in eight bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.native import packing
from engine.native.compiled.trust import is_ours
from engine.native.packing import Format, Panels

_log = logging.getLogger(__name__)
_ALIGNED = 64
_LENGTH = 8


class PanelFile:
    """Keeps the panels of the matrices that are made from ``sources``, quantised as ``choice`` says, below ``folder``.

    A file that cannot be written, or no longer is that of the sources, costs a start its speed and nothing else.
    """

    def __init__(self, folder: Path, sources: Sequence[Path], choice: str = "none") -> None:
        found = [(str(path.resolve()), path.stat()) for path in sources]
        code = hashlib.sha256(Path(packing.__file__).read_bytes()).hexdigest()
        self.sources = [Path(name) for name, _ in found]
        self._of = [[[name, stat.st_size, stat.st_mtime_ns] for name, stat in found], choice, code]
        self.path = folder / f"{hashlib.sha256(found[0][0].encode()).hexdigest()[:16]}.panels"
        self._entries: dict[str, tuple[int, int, int, int]] = {}  # format, offset, panels, bytes of a panel
        self._mapped: np.ndarray | None = None
        self.places: list[tuple[int, int, int]] = []
        """Where parts of the file are mapped: address, offset in the file, bytes."""
        self._file: Any = None
        try:
            if not self._read():
                self._begin()
        except OSError as error:
            self._give_up(error)

    def panels(self, name: str, expected: tuple[Format, int, int], make: Callable[[], Panels]) -> Panels:
        """The panels of a matrix, by its name in the model; ``expected`` are their format, their number and the bytes
        of one."""
        format, count, size = expected
        if self._mapped is not None:
            kept = self._entries.get(name)
            if kept is None or (kept[0], *kept[2:]) != (int(format), count, size):
                return make()
            data = self._mapped[kept[1] : kept[1] + count * size]
            if len(data) < count * size:
                return make()
            return Panels(torch.from_numpy(data).view(count, size), format)
        made = make()
        if self._file is None or name in self._entries:
            return made
        try:
            start = self._file.seek(-(-self._file.tell() // _ALIGNED) * _ALIGNED)
            self._file.write(made.data.numpy())
            self._file.flush()
            mapped = np.memmap(self._file.name, np.uint8, "c", start, (count, size))
        except OSError as error:
            self._give_up(error)
            return made
        self._entries[name] = int(format), start, count, size
        self.places.append((mapped.ctypes.data, start, mapped.nbytes))
        return Panels(torch.from_numpy(mapped), format)

    def finish(self) -> bool:
        """Give the file its name, once all panels are made; until then no other process sees it.

        Whether the next start finds it.
        """
        if self._file is None:
            return self._mapped is not None
        try:
            index = json.dumps({"of": self._of, "entries": self._entries}).encode()
            self._file.write(index + len(index).to_bytes(_LENGTH, "little"))
            self._file.flush()
            os.fsync(self._file.fileno())  # bytes before the name, or a power loss could leave other numbers
            os.replace(self._file.name, self.path)
        except OSError as error:
            self._give_up(error)
            return False
        self._file.close()
        self._file = None
        return True

    def _read(self) -> bool:
        """Map what an earlier start kept; False if that is not of these sources."""
        index = _index_of(self.path)
        if index is None or index["of"] != self._of or not is_ours(self.path):
            return False
        self._entries = {name: tuple(entry) for name, entry in index["entries"].items()}
        self._mapped = np.memmap(self.path, np.uint8, "c")
        self.places.append((self._mapped.ctypes.data, 0, self._mapped.nbytes))
        return True

    def _begin(self) -> None:
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in folder.glob("*.panels"):
            index = _index_of(other)
            if index is None or other == self.path or not all(Path(name).exists() for name, *_ in index["of"][0]):
                other.unlink(missing_ok=True)
        for part in folder.glob(f"{self.path.stem}.*.part"):  # of a start that was ended; one that still runs goes on
            part.unlink(missing_ok=True)
        self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - open for as long as the model is loaded
            dir=folder, prefix=f"{self.path.stem}.", suffix=".part", delete=False
        )

    def _give_up(self, error: OSError) -> None:
        _log.warning("The next start rearranges the weights again, because that cannot be kept: %s", error)
        if self._file is not None:
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _index_of(path: Path) -> dict[str, Any] | None:
    """The index of a file; None where there is none, or no whole one."""
    try:
        with path.open("rb") as file:
            end = file.seek(-_LENGTH, os.SEEK_END)
            length = int.from_bytes(file.read(_LENGTH), "little")
            file.seek(end - length)
            index = json.loads(file.read(length))
            return index if {"of", "entries"} <= index.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
