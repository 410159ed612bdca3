"""A repository of the hub: what it holds, its small files, and exactly the weights that a model needs.

The small files come first. Whether the model can be served is decided by them, and by the names and sizes of the rest;
nothing else is asked for. Copies of the weights in other formats (``original/*``, ``consolidated*``, other precisions)
are never fetched. huggingface_hub keeps the files and resumes what was interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from engine.api.errors import SourceError
from engine.api.units import size
from engine.failures import first_line, sentence

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "*processor_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    INDEX,
)
"""What is fetched before anything is decided, by the names of files at the top of a repository."""
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
LARGEST_SMALL_FILE = 256 << 20

_NO_CODE = "weights in other formats can hold code and are not loaded"
# What a repository holds instead of a model, by one of its files: config.json is missing, or weights are.
_INSTEAD = (
    (("*.gguf",), "it holds GGUF files; download one of them and name the file: castor serve FILE.gguf"),
    (
        ("adapter_config.json", "adapter_model.*"),
        "it holds an adapter, not a model; merge it into its base model and save that as safetensors",
    ),
    (("model_index.json",), "it holds a pipeline that makes images; take a model that continues text"),
    (
        ("consolidated*", "params.json"),
        "its weights are in Mistral's or Meta's own format (consolidated*, params.json); take a repository of the "
        "model in the format of transformers, or a GGUF file of it",
    ),
    (
        ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.msgpack", "*.h5", "*.pkl"),
        f"{_NO_CODE}; take a repository of the model with safetensors, or a GGUF file of it",
    ),
)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit: the sizes of its files by name, top level only, and where its small files are."""

    name: str
    commit: str
    sizes: dict[str, int]
    cache_dir: Path
    folder: Path

    def weights(self) -> list[str]:
        """The files of weights that the index names, or the one without an index. Raises ``SourceError``."""
        if INDEX not in self.sizes:
            return [WEIGHTS]
        try:
            named = sorted(
                {str(name) for name in json.loads((self.folder / INDEX).read_bytes())["weight_map"].values()}
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SourceError(f"{INDEX} of {self.name} is not a weight index: {sentence(error)}") from None
        absent = [name for name in named if not name.endswith(".safetensors") or name not in self.sizes]
        if absent:
            raise SourceError(f"{INDEX} of {self.name} names {absent[0]!r}, which is no safetensors file beside it")
        return named

    def bytes_of_weights(self) -> int:
        return sum(self.sizes[name] for name in self.weights())

    def fetch_weights(self) -> None:
        """Download what ``weights`` names into ``folder``. Raises ``SourceError``, also where the disk is too small."""
        missing = [name for name in self.weights() if not (self.folder / name).exists()]
        needed, free = sum(self.sizes[name] for name in missing), shutil.disk_usage(self.cache_dir).free
        if needed > free:
            raise SourceError(
                f"the weights of {self.name} take {size(needed)}, and {size(free)} are free on the disk of "
                f"{self.cache_dir}; free some space or set another cache folder"
            )
        _download(self.name, self.commit, missing, self.cache_dir)


def look(name: str, cache_dir: Path) -> Repository:
    """Fetch the small files of a repository. Raises ``SourceError`` for one that by its files holds no model."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _one_sentence(name):
        api = HfApi()
        commit = str(api.repo_info(name).sha)
        entries = [entry for entry in api.list_repo_tree(name, revision=commit) if isinstance(entry, RepoFile)]
    sizes = {entry.path: entry.size for entry in entries}
    if problem := _problem(sizes):
        raise SourceError(f"{name} cannot be served: {problem}")
    small = [file for file in sizes if any(fnmatchcase(file, pattern) for pattern in SMALL_FILES)]
    for file in small:
        if sizes[file] > LARGEST_SMALL_FILE:
            raise SourceError(
                f"{file} of {name} has {size(sizes[file])}; at most {size(LARGEST_SMALL_FILE)} are read of it"
            )
    with _no_bars():
        folder = _download(name, commit, small, cache_dir, MORE_TEMPLATES)
    return Repository(name, commit, sizes, cache_dir, folder)


def _problem(names: Iterable[str]) -> str | None:
    """Why a repository with these files holds no model that can be served; None if it may."""
    names = set(names)
    has_weights = INDEX in names or WEIGHTS in names
    if "config.json" not in names or not has_weights:
        missing = "config.json" if "config.json" not in names else f"{WEIGHTS} or {INDEX}"
        for patterns, said in _INSTEAD:
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                return f"it has no {missing}: {said}"
        others = sorted(name for name in names if name.endswith(".safetensors"))
        found = f", only {', '.join(others[:3])}" if others else ""
        return f"it has no {missing}{found}; take a repository in the format of transformers"
    if "tokenizer.json" not in names:
        others = sorted(name for name in names if name.startswith(("tekken", "tokenizer.model", "vocab", "spiece")))
        found = f", only {', '.join(others)}" if others else ""
        return (
            f"it has no tokenizer.json{found}; take a repository of the model that has one, or save it there with "
            "transformers (AutoTokenizer, save_pretrained) and serve the folder"
        )
    return None


def _download(name: str, commit: str, files: Iterable[str], cache_dir: Path, *patterns: str) -> Path:
    """The snapshot's folder, with these files in it."""
    from huggingface_hub import snapshot_download

    with _one_sentence(name):
        allowed = [*(escape(file) for file in files), *patterns]
        return Path(snapshot_download(name, revision=commit, cache_dir=cache_dir / "hub", allow_patterns=allowed))


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bars of huggingface_hub, which are for weights: small files are there in a moment."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    from huggingface_hub import errors

    of_transport = errors.HTTPError  # type: ignore[attr-defined]  # that of the HTTP library, whichever it is
    try:
        yield
    except errors.RepositoryNotFoundError:
        raise SourceError(f"the hub has no model {name}, or it needs a login (set HF_TOKEN)") from None
    except (of_transport, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(f"{name} cannot be downloaded from the hub: {first_line(error)}") from None
