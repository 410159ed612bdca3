"""Panels in the cache: made once, mapped afterwards, and never those of other weights."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from support.gguf_converter import converted, quantised, write_gguf
from support.gguf_families import FAMILIES
from transformers import AutoModelForCausalLM

from engine.api.engine import EngineConfig
from engine.gguf.architectures import config_of
from engine.gguf.header import read_header
from engine.native import products
from engine.native.packing import Format, Panels
from engine.packed.folder import GgufFile, load_held
from engine.packed.panel_file import PanelFile

EXPECTED = Format.Q8_0, 3, 544
PANELS = {name: Panels(torch.arange(3 * 544).add(add).to(torch.uint8).view(3, 544), Format.Q8_0) for name, add in
          {"q": 0, "k": 7, "v": 21}.items()}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"weights")
    return path


def filled(folder: Path, source: Path) -> list[str]:
    """Asks for all panels, checks them, and tells which had to be made."""
    made: list[str] = []

    def make(name: str) -> Panels:
        made.append(name)
        return PANELS[name]

    kept = PanelFile(folder, [source])
    for name, panels in PANELS.items():
        found = kept.panels(name, EXPECTED, lambda name=name: make(name))  # type: ignore[misc]
        assert found.format == Format.Q8_0
        assert torch.equal(found.data, panels.data)
    kept.finish()
    return made


def test_a_second_start_makes_none(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "panels"
    assert filled(folder, source) == ["q", "k", "v"]
    assert filled(folder, source) == []
    (kept,) = folder.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.stat().st_size < 3 * 3 * 544 + 1000


def test_a_start_that_was_ended_leaves_nothing_to_read(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "panels"
    PanelFile(folder, [source]).panels("q", EXPECTED, lambda: PANELS["q"])
    assert filled(folder, source) == ["q", "k", "v"]
    assert [path.suffix for path in folder.iterdir()] == [".panels"]


@pytest.mark.parametrize("change", ["bytes", "time"])
def test_other_weights_have_other_panels(tmp_path: Path, source: Path, change: str) -> None:
    filled(tmp_path / "panels", source)
    if change == "bytes":
        source.write_bytes(b"others")
    else:
        os.utime(source, ns=(1, 1))
    assert filled(tmp_path / "panels", source) == ["q", "k", "v"]
    assert filled(tmp_path / "panels", source) == []


def test_a_matrix_of_another_shape_is_made(tmp_path: Path, source: Path) -> None:
    filled(tmp_path / "panels", source)
    other = Panels(torch.ones(2, 544, dtype=torch.uint8), Format.Q8_0)
    found = PanelFile(tmp_path / "panels", [source]).panels("q", (Format.Q8_0, 2, 544), lambda: other)
    assert found is other


@pytest.mark.parametrize("kept", [b"", b"short", b"x" * 500, b"[]" + (2).to_bytes(8, "little"), b"{}" + b"\xff" * 8])
def test_a_damaged_file_is_made_again(tmp_path: Path, source: Path, kept: bytes) -> None:
    filled(tmp_path / "panels", source)
    (path,) = (tmp_path / "panels").iterdir()
    path.write_bytes(kept)
    assert filled(tmp_path / "panels", source) == ["q", "k", "v"]
    assert filled(tmp_path / "panels", source) == []


def test_a_file_that_others_may_write_is_made_again(tmp_path: Path, source: Path) -> None:
    filled(tmp_path / "panels", source)
    (path,) = (tmp_path / "panels").iterdir()
    path.chmod(0o666)
    assert filled(tmp_path / "panels", source) == ["q", "k", "v"]
    assert filled(tmp_path / "panels", source) == []


def test_an_index_that_leads_beyond_the_file_is_not_followed(tmp_path: Path, source: Path) -> None:
    filled(tmp_path / "panels", source)
    (path,) = (tmp_path / "panels").iterdir()
    kept = path.read_bytes()
    length = int.from_bytes(kept[-8:], "little")
    index = json.loads(kept[-8 - length : -8])
    index["entries"]["k"][1] = len(kept) - 10
    told = json.dumps(index).encode()
    path.write_bytes(kept[: -8 - length] + told + len(told).to_bytes(8, "little"))
    assert filled(tmp_path / "panels", source) == ["k"]


def test_panels_of_weights_that_are_gone_are_deleted(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "panels"
    filled(folder, source)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    filled(folder, other)
    assert len(list(folder.iterdir())) == 2
    source.unlink()
    third = tmp_path / "third.gguf"
    third.write_bytes(b"third")
    filled(folder, third)
    assert len(list(folder.iterdir())) == 2


def test_what_cannot_be_kept_is_made_and_said(tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "panels"
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert filled(folder, source) == ["q", "k", "v"]
    (record,) = caplog.records
    assert "The next start rearranges the weights again" in record.getMessage()


def test_a_full_disk_ends_the_keeping_alone(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = PanelFile(tmp_path / "panels", [source])
    kept.panels("q", EXPECTED, lambda: PANELS["q"])

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    kept.finish()
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "panels").iterdir())


@pytest.mark.parametrize("name", ["gemma3", "qwen3moe"])
def test_a_model_is_loaded_from_what_was_kept(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    data = quantised(tensors, {"attn|embd|output|ffn|exps": "Q8_0"})
    header = read_header(write_gguf(tmp_path / "m.gguf", family.architecture, keys, data))
    model_config = config_of(header)
    model_class = AutoModelForCausalLM._model_mapping[type(model_config)]
    wanted = EngineConfig(str(tmp_path), cache_dir=str(tmp_path_factory.getbasetemp()))  # which has the compiled code

    def logits() -> torch.Tensor:
        keywords = {"dtype": torch.float32, "attn_implementation": "eager"}
        held = GgufFile(header, model_config)
        module, _, panels = load_held(held, model_class, model_config, wanted, torch.device("cpu"), **keywords)
        assert panels is not None
        panels.finish()
        with torch.inference_mode():
            found: torch.Tensor = module.eval()(input_ids=torch.tensor([[5, 9, 40, 77]]), use_cache=False).logits
        return found

    first = logits()
    monkeypatch.setattr(products, "pack_blocks", None)  # nothing is made any more
    assert torch.equal(logits(), first)
