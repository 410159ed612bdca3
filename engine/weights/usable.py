"""Whether a folder or a file can be a model, and if not, what it is instead and what would work."""

from __future__ import annotations

import re
from pathlib import Path

HEAD_BYTES = 512
GGUF_LINK = "weights.gguf"
"""In the prepared folder of a GGUF file: a link to it, or to the first of its parts."""
NO_CODE = "weights in it can hold code and are not loaded; take the model's safetensors or GGUF files"
KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"\Z", "it is empty; copy or download it again"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS; run `git lfs pull` where it came from"),
    (rb".{8}\{\s*\"", "it is a safetensors file; name the folder that holds it with config.json and tokenizer.json"),
    (rb"PK\x03\x04", f"it is an archive, such as torch saves; {NO_CODE}"),
    (rb"\x80[\x02-\x05]", f"it is a pickle of Python; {NO_CODE}"),
    (rb"\s*<(!doctype|html)", "it is a web page; download the file behind the page"),
    (rb"\s*\{", "it is JSON; name the folder that holds it with the *.safetensors"),
)
"""How files begin that are taken for models, and what to say of them."""


def folder_problem(folder: Path) -> str | None:
    """Why ``folder`` cannot be served as a model, in one sentence; None if it can."""
    if not folder.is_dir():
        reason = "it is neither a folder nor a file" if folder.exists() else "there is nothing at that path"
        return f"{folder} is no model: {reason}; name a model folder or a .gguf file"
    if not (folder / "config.json").is_file():
        return f"{folder} is not a model folder: it has no config.json"
    if (folder / GGUF_LINK).is_symlink():
        if not (folder / GGUF_LINK).is_file():
            return f"{folder} was prepared from {(folder / GGUF_LINK).readlink()}, which is gone; put the file back"
    elif not any(folder.glob("*.safetensors")):
        return f"{folder} has no *.safetensors; weights in other formats can hold code and are not loaded"
    if not (folder / "tokenizer.json").is_file():
        return f"{folder} has no tokenizer.json; download it with the model or save the tokenizer there"
    return None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights in any format, one that is loaded or not."""
    formats = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
    return folder.is_dir() and any(path.suffix in formats for path in folder.iterdir())


def gguf_problem(path: Path) -> str | None:
    """Why ``path`` is no GGUF file, by how it begins, in one sentence; None if it may be one. Raises ``OSError``."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"GGUF"):
        return None
    known = (said for begins, said in KINDS if re.match(begins, head, re.DOTALL | re.IGNORECASE))
    kind = next(known, "it does not begin with the letters GGUF; name a model folder or a .gguf file")
    return f"{path} is not a GGUF file: {kind}"
