"""Images on disk: what one belongs to, and that its bytes have not changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import engine
from engine.api.engine import EngineConfig
from engine.native.compiled.trust import is_ours

# Neither the structures nor the facts that are kept with them depend on these.
_OF_A_START = {"kv_memory", "max_running", "max_waiting", "step_target_ms", "threads", "state_stride", "cuda_graphs"}
_DEVICES = ("nvidia*", "kfd", "dxg")
_DIGEST = hashlib.sha256().digest_size
_LENGTH = 8
_DIGESTED = 1 << 28
"""How many bytes have a digest. Beyond are the largest weights in floats, which have none, as panels: reading gigabytes
twice would be most of a start."""


@dataclass(frozen=True, slots=True)
class Image:
    """``data`` are the bytes of the structures, mapped so that writing changes no file; ``pointers`` are those of
    ``engine.image.links``; ``facts`` is what was kept with them."""

    data: np.ndarray
    pointers: np.ndarray
    facts: dict[str, Any]


def image_path(config: EngineConfig) -> Path | None:
    """Where the image of a model is kept; None for an engine that keeps none."""
    if config.cache_dir is None or not config.native or config.device not in ("auto", "cpu"):
        return None
    name = hashlib.sha256(str(Path(config.path).resolve()).encode()).hexdigest()[:16]
    return Path(config.cache_dir) / "panels" / f"{name}.image"


def owner(config: EngineConfig) -> dict[str, Any]:
    """What an image belongs to beside the sources of its panels: the model's folder, the settings and the code.

    The devices are what "auto" chooses from.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _OF_A_START}
    return {
        "folder": states(sorted(path for path in Path(config.path).iterdir() if path.is_file())),
        "settings": settings,
        "code": _code(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "devices": sorted(str(path) for name in _DEVICES for path in Path("/dev").glob(name)),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def states(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, bytes and time of change of each file."""
    found = ((path, path.stat()) for path in paths)
    return [[str(path), kept.st_size, kept.st_mtime_ns] for path, kept in found]


def write_image(path: Path, data: Iterable[bytes], pointers: np.ndarray, facts: dict[str, Any]) -> None:
    """Keep an image under its name once it is whole, and delete those of models that are gone. Raises ``OSError``."""
    for other in path.parent.glob("*.image"):
        found = read_image(other)
        if found is None or not all(Path(name).exists() for name, *_ in found.facts["sources"]):
            other.unlink(missing_ok=True)
    for part in path.parent.glob(f"{path.stem}.*.new"):  # of a start that was ended
        part.unlink(missing_ok=True)
    digest, length, digested = hashlib.sha256(), 0, 0
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}.", suffix=".new", delete=False) as file:
        try:
            for chunk in data:
                file.write(chunk)
                length += len(chunk)
                if length <= _DIGESTED:
                    digest.update(chunk)
                    digested = length
            told = json.dumps({**facts, "length": length, "digested": digested, "pointers": len(pointers)}).encode()
            rest = pointers.tobytes() + told + len(told).to_bytes(_LENGTH, "little")
            digest.update(rest)
            file.write(rest + digest.digest())
            file.flush()
            os.fsync(file.fileno())  # bytes before the name, as for panels
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_image(path: Path) -> Image | None:
    """The image of a file; None where there is none, or one that is not whole."""
    try:
        if not is_ours(path):
            return None  # it holds addresses
        data = np.memmap(path, np.uint8, "c")
        told = data[-_DIGEST - _LENGTH : -_DIGEST]
        end = len(data) - _DIGEST - _LENGTH
        size = int.from_bytes(told.tobytes(), "little")
        facts = json.loads(data[end - size : end].tobytes())
        length, count = facts["length"], facts["pointers"]
        digest = hashlib.sha256(data[: facts["digested"]].data)
        digest.update(data[length:-_DIGEST].data)
        if digest.digest() != data[-_DIGEST:].tobytes() or length + 24 * count != end - size:
            return None
        return Image(data[:length], data[length : end - size].view(np.int64).reshape(count, 3), facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def _code() -> str:
    """A digest of the sources of the engine, C included: other code may describe another model."""
    root, digest = Path(engine.__file__).parent, hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".h", ".c")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
