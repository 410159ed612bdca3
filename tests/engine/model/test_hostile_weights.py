"""Files of weights that a stranger made to break a loader: refused at once, without code run or memory taken."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.gguf_files import write_tiny_gguf
from support.tiny import tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.gguf.prepare import prepare
from engine.model.loader import load_model

MEMORY = 3 << 30
"""What a process with torch and transformers may have resident; libraries alone are some hundred MiB."""

WATCHED = """
import json, os, resource, sys
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[1])
attempt = __import__(sys.argv[2], fromlist=["attempt"]).attempt
told = {path.name: attempt(path) for path in sorted(Path(sys.argv[3]).iterdir())}
print(json.dumps([told, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def attempt(path: Path) -> str:
    """What is said of a file or a folder; runs in a process of its own."""
    if path.is_dir():
        try:
            load_model(EngineConfig(path=str(path), device="cpu"), lambda *_: None)
        except ModelRefused as refusal:
            return str(refusal)
        return ""
    target = path.parent.parent / "target" / path.name
    target.mkdir(parents=True)
    try:
        prepare(path, target)
    except Exception as error:
        return str(error)
    return ""


def told_of(folder: Path) -> dict[str, str]:
    """What is said of each thing in a folder, by a process whose memory is looked at."""
    command = [sys.executable, "-c", WATCHED, json.dumps(sys.path), __name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told, most = json.loads(done.stdout.splitlines()[-1])
    assert most < MEMORY
    return dict(told)


# safetensors


def header(**changes: Any) -> bytes:
    """The beginning of a file with one tensor, changed."""
    tensor = {"dtype": "F32", "shape": [320, 64], "data_offsets": [0, 81920], **changes}
    return packed({"model.embed_tokens.weight": tensor})


def packed(described: Any, length: int | None = None) -> bytes:
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def overlapping() -> dict[str, Any]:
    tensor = {"dtype": "F32", "shape": [320, 64], "data_offsets": [0, 81920]}
    return {"model.embed_tokens.weight": tensor, "lm_head.weight": tensor}


SAFETENSORS = {
    "length": packed({}, 2**63),
    "longest": packed({}, 2**64 - 1),
    "huge": struct.pack("<Q", 90_000_000) + b'{"a":' * 18_000_000,
    "overlapping": packed(overlapping()),
    "dtype": header(dtype="F64"),
    "unknown": header(dtype="PICKLE"),
    "overflow": header(shape=[2**33, 2**33]),
    "negative": header(shape=[-1, 64]),
    "beyond": header(data_offsets=[0, 2**62]),
    "backwards": header(data_offsets=[81920, 0]),
    "deep": struct.pack("<Q", 400_000) + b"[" * 400_000,
    "no_json": struct.pack("<Q", 8) + b"\xff" * 8,
}


def test_hostile_safetensors_are_refused(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", num_hidden_layers=1)
    for name, beginning in SAFETENSORS.items():
        folder = tmp_path / "hostile" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
        # As long as a file that holds the model, so that its size tells nothing.
        (folder / "model.safetensors").write_bytes(beginning + bytes(10**6))
    told = told_of(tmp_path / "hostile")
    assert {name: text for name, text in told.items() if "cannot be loaded" not in text or "\n" in text} == {}


class Marked:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model.pth"])
@pytest.mark.parametrize("way", ["alone", "beside", "indexed"])
def test_pickles_are_never_read(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = tiny_model_folder(tmp_path / "model"), tmp_path / "mark"
    reads: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: reads.append(args))
    (folder / name).write_bytes(pickle.dumps(Marked(mark)))
    if way == "alone":
        (folder / "model.safetensors").unlink()
    if way == "indexed":
        write_index(folder, name)
    told = attempt(folder)
    assert bool(told) == (way != "beside"), told
    assert not mark.exists()
    assert reads == []


def write_index(folder: Path, name: str) -> None:
    """Say that all weights are in the file ``name``."""
    index = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("name", ["../other.safetensors", "a/other.safetensors", "/etc/passwd", "", 7])
def test_an_index_leads_nowhere_else(name: Any, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    write_index(folder, name)
    assert "only *.safetensors beside it are read" in attempt(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "is not a weight index" in attempt(folder)


def test_weights_in_parts_are_loaded(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    write_index(folder, "other.safetensors")
    assert attempt(folder) == ""


def test_code_beside_a_model_never_runs(tmp_path: Path) -> None:
    folder, mark = tiny_model_folder(tmp_path / "model"), tmp_path / "mark"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    mapped = {"auto_map": dict.fromkeys(names, "code.Config"), "trust_remote_code": True}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **mapped}))
    assert attempt(folder) == ""
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", **mapped}))
    assert "not understood" in attempt(folder)
    assert not mark.exists()


# GGUF


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def gguf_head(tensors: int, values: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values)


def hostile_gguf(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Files whose counts, lengths, dimensions and offsets lie."""
    yield "values", gguf_head(0, 2**60) + good[24:]
    yield "tensors", good[:8] + struct.pack("<Q", 2**60) + good[16:]
    yield "string", gguf_head(0, 1) + struct.pack("<Q", 2**60) + bytes(100)
    yield "negative_string", gguf_head(0, 1) + struct.pack("<Q", 2**64 - 8) + bytes(100)
    yield "array", gguf_head(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(100)
    yield "texts", gguf_head(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(10**6)
    yield "arrays", gguf_head(0, 1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10**5
    yield "cut", good[: len(good) // 2]
    name = text("token_embd.weight")
    start = good.index(name) + len(name)
    count = struct.unpack_from("<I", good, start)[0]
    rest = start + 4 + 8 * count
    for label, dims in {"dims": (32, 2**62), "product": (2**40, 2**40), "negative": (32, 2**64 - 1)}.items():
        yield label, good[: start + 4] + struct.pack("<QQ", *dims) + good[rest:]
    yield "count", good[:start] + struct.pack("<I", 2**31) + good[start + 4 :]
    yield "kind", good[:rest] + struct.pack("<I", 999) + good[rest + 4 :]
    yield "offset", good[: rest + 4] + struct.pack("<Q", 2**60) + good[rest + 12 :]
    for key in ("block_count", "embedding_length", "feed_forward_length"):
        place = good.index(text(f"llama.{key}")) + len(text(f"llama.{key}")) + 4
        yield key, good[:place] + struct.pack("<I", 10**9) + good[place + 4 :]


def test_hostile_gguf_files_are_refused(tmp_path: Path) -> None:
    good = write_tiny_gguf(tmp_path / "good.gguf").read_bytes()
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, content in hostile_gguf(good):
        (folder / f"{name}.gguf").write_bytes(content)
    told = told_of(folder)
    assert len(told) >= 17
    assert [name for name, problem in told.items() if not problem] == []
    assert "llama.block_count is 1000000000; 1 to 1000 are read" in told["block_count.gguf"]
    assert "describe" in told["embedding_length.gguf"]


def test_what_an_engine_leaves_is_for_its_owner_alone() -> None:
    """The umask is not trusted: the socket's folder lets nobody else in."""
    shown = """
import asyncio, os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from engine.process.supervisor import worker_process
from engine.api.engine import EngineConfig

async def main():
    os.umask(0)
    async with worker_process(EngineConfig(""), (sys.executable, "-c", "import time; time.sleep(60)")) as worker:
        print(oct(os.stat(worker._folder).st_mode & 0o777), os.listdir(worker._folder))

asyncio.run(main())
"""
    command = [sys.executable, "-c", shown, os.pathsep.join(sys.path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told == "0o700 ['engine']\n"
