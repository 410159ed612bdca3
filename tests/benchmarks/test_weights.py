"""How many bytes a decoded token reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from benchmarks.harness.weights import bytes_per_token
from engine.weights.usable import GGUF_LINK


def test_the_weights_of_a_token(tmp_path: Path) -> None:
    def save(name: str, **shapes: list[int]) -> None:
        header = {"__metadata__": {}, **{key: {"dtype": "F32", "shape": shape} for key, shape in shapes.items()}}
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text)

    save("model-1.safetensors", **{"model.embed_tokens.weight": [10, 4], "model.norm.weight": [4]})
    assert bytes_per_token(tmp_path) == 4 * 44
    save("model-2.safetensors", **{"lm_head.weight": [10, 4]})
    assert bytes_per_token(tmp_path) == 4 * 44
    (tmp_path / "model.gguf").write_bytes(b"12345")
    assert bytes_per_token(tmp_path / "model.gguf") == 5


def test_the_file_that_a_prepared_folder_links_to(tmp_path: Path) -> None:
    (tmp_path / "in.gguf").write_bytes(b"12345")
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / GGUF_LINK).symlink_to(tmp_path / "in.gguf")
    assert bytes_per_token(folder) == 5
