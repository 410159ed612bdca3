"""The wheels that the server needs and a CUDA image lacks, and a check that nothing else is missing."""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
MOST_BYTES = 64 << 20
# The packages to fetch: those of the server and of the extra ``gpu``. An image with torch, transformers and their
# dependencies has the rest.
CARRIED = (
    "annotated-types", "einops", "fla-core", "gguf", "httptools", "jsonschema-rs", "llguidance", "msgspec", "pydantic",
    "pydantic-core", "pyjson5", "pypdfium2", "python-multipart", "pyzmq", "starlette", "structlog", "transformers",
    "typing-inspection", "uvicorn",
)  # fmt: skip
# What such an image has, with the versions of one that was inspected (2026-11).
IMAGE = {
    "accelerate": "1.15.0", "annotated-doc": "", "anyio": "", "click": "", "h11": "", "huggingface-hub": "1.33.0",
    "idna": "", "jinja2": "", "numpy": "2.5.2", "packaging": "", "prometheus-client": "", "pyyaml": "", "regex": "",
    "requests": "", "rich": "", "safetensors": "0.8.0", "shellingham": "", "tokenizers": "0.23.2", "torch": "2.11.0",
    "tqdm": "", "triton": "3.6.0", "typer": "", "typing-extensions": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package in the version that is fetched, and its requirements."""

    name: str
    version: str
    needs: tuple[str, ...]


def pins(constraints: str) -> list[str]:
    """The fetched packages as constraints.txt pins them. Raises ``KeyError`` for one that it lacks."""
    exact = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    versions: dict[str, str] = {canonicalize_name(name): version for name, version in exact.items()}
    return [f"{name}=={versions[name]}" for name in CARRIED]


def command(folder: Path, python: str) -> list[str]:
    """The pip command that fetches them: for CPython 3.12 on x86-64 Linux, whatever this machine is."""
    # pip matches exactly the given tags and no older ones; 39 is the glibc of such images.
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
    tags = [part for name in (*platforms, "manylinux2014_x86_64", "manylinux1_x86_64") for part in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *tags]
    return [python, "-m", "pip", "download", "-q", *options, "-d", str(folder), *pins(_text("constraints.txt"))]


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's metadata."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
        metadata = message_from_string(archive.read(name).decode("utf-8"))
    needs = tuple(metadata.get_all("Requires-Dist") or ())
    return Wheel(canonicalize_name(metadata["Name"]), metadata["Version"], needs)


def problems(wheels: Iterable[Wheel], project: Iterable[str]) -> Iterator[str]:
    """Requirements of the project or a wheel that are neither fetched nor on the image, or there in a wrong version.

    Extras are left out: of uvicorn's, the server needs httptools alone, which it names itself.
    """
    carried = {wheel.name: wheel for wheel in wheels}
    for name in CARRIED:
        if name not in carried:
            yield f"{name} was not fetched"
    asking = [("this project", need) for need in project]
    asking += [(wheel.name, need) for wheel in carried.values() for need in wheel.needs]
    for who, text in asking:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate(_environment()):
            continue
        name = canonicalize_name(need.name)
        found = carried[name].version if name in carried else IMAGE.get(name)
        if found is None:
            yield f"{who} needs {name}, which is neither carried nor on the image"
        elif found and not need.specifier.contains(found, prereleases=True):
            yield f"{who} needs {name} {need.specifier}, but {found} is {'carried' if name in carried else 'there'}"


def project_needs() -> list[str]:
    """The requirements of the project itself, with its extra for GPUs."""
    project = tomllib.loads(_text("pyproject.toml"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["gpu"]]


def _environment() -> dict[str, str]:
    """The image's values of environment markers."""
    there = {
        "implementation_name": "cpython",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{PYTHON}.3",
        "python_version": PYTHON,
        "sys_platform": "linux",
        "extra": "",
    }
    return {**{key: str(value) for key, value in default_environment().items()}, **there}


def _text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")
