"""Tensors in the files of a folder of safetensors, mapped: pages are read when they are used, and shared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.api.errors import ModelRefused


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open file."""

    file: Any

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor where the file is mapped. Never written to."""
        found: torch.Tensor = self.file.get_tensor(name)
        return found

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type, in the words of safetensors, and shape of a tensor, of which nothing is read."""
        part = self.file.get_slice(name)
        return str(part.get_dtype()), tuple(part.get_shape())


def open_files(folder: Path) -> dict[str, TensorFile]:
    """The files of a checkpoint by the names of the tensors in them: those that the index names, or the one without.

    Raises ``ModelRefused`` where a file is missing, or two have a tensor of the same name.
    """
    index = folder / "model.safetensors.index.json"
    named = {"model.safetensors"}
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    found: dict[str, TensorFile] = {}
    for path in (folder / name for name in sorted(named)):
        if not path.is_file():
            raise ModelRefused(f"{path} is missing; copy or download it again")
        file = TensorFile(safe_open(path, framework="pt"))
        for name in file.file.keys():  # noqa: SIM118 - a file of tensors is not a dictionary
            if name in found:
                raise ModelRefused(f"two files of {folder} have a tensor {name}; remove the one that does not belong")
            found[name] = file
    return found
