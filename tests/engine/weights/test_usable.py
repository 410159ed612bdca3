"""What is said of files and folders that are no models."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from engine.weights.usable import folder_problem, gguf_problem


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (safetensors(), "is a safetensors file; name the folder that holds it"),
        (pickle.dumps({"w": 1}), "is a pickle of Python; weights in it can hold code"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"<html lang='en'>", "is a web page"),
        (b'{"model_type": "llama"}', "is JSON; name the folder"),
        (b"GGU", "does not begin with the letters GGUF"),
        (b"lmgg", "does not begin with the letters GGUF"),
        (b"\xff\xfe\x00\x01" * 200, "does not begin with the letters GGUF"),
    ],
)
def test_a_file_that_is_no_gguf_is_told_what_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    problem = gguf_problem(path)
    assert problem is not None
    assert problem.startswith(f"{path} is not a GGUF file: ")
    assert said in problem
    assert "\n" not in problem


def test_an_archive_of_torch_is_told_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "is an archive, such as torch saves" in str(gguf_problem(path))


def test_a_gguf_file_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert gguf_problem(tmp_path / "a") is None
    with pytest.raises(FileNotFoundError):
        gguf_problem(tmp_path / "b")


def test_what_is_neither_a_folder_nor_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a file" in str(folder_problem(tmp_path / "pipe"))
    assert "nothing at that path" in str(folder_problem(tmp_path / "nowhere"))
