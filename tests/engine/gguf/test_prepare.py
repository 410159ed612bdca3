"""Folders of GGUF files: what transformers makes of a tokenizer is put right, and what cannot be is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from support.gguf_files import HEADS, HIDDEN, write_tiny_gguf
from tokenizers import Tokenizer

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.gguf import prepare as preparation
from engine.gguf.header import Unreadable, read_header
from engine.gguf.prepare import describe, prepare
from engine.gguf.tokenizer import repair_tokenizer
from engine.model.loader import load_model
from engine.weights.usable import GGUF_LINK, folder_problem

ROOT = Path(__file__).parents[3]


def run_preparation(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    target.mkdir()
    command = [sys.executable, "-m", "engine.gguf.prepare", str(source), str(target)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose third control token has characters that a byte-level vocabulary spells otherwise."""
    place = tmp_path_factory.mktemp("prepared")
    control = ("<|endoftext|>", "<｜User｜>", "<|eot|>", "<|end|>")
    sampling = {"temp": 0.25, "top_k": 30, "top_p": 0.5, "min_p": 0.125, "penalty_repeat": 1.5, "mirostat": 2}
    advised = {f"general.sampling.{name}": value for name, value in sampling.items()}
    metadata = {"tokenizer.ggml.eot_token_id": 2, **advised}
    source = write_tiny_gguf(place / "in.gguf", control=control, metadata=metadata)
    done = run_preparation(source, place / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "progress 1.00"
    return place


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_digits_are_split_one_by_one(prepared: Path) -> None:
    """The merges hold "20" and "12", which this family's cut never lets come together."""
    assert tokenizer_of(prepared / "out").encode("x2012").tokens == ["x", "2", "0", "1", "2"]


def test_a_control_token_of_any_spelling_is_one_special_token(prepared: Path) -> None:
    tokenizer = tokenizer_of(prepared / "out")
    assert tokenizer.encode("<｜User｜>a").ids[0] == 1
    assert tokenizer.decode([1], skip_special_tokens=False) == "<｜User｜>"
    assert tokenizer.decode([1], skip_special_tokens=True) == ""
    assert tokenizer.get_vocab_size() == 4 + 256 + 2


def test_every_byte_survives_the_round_trip(prepared: Path) -> None:
    tokenizer = tokenizer_of(prepared / "out")
    text = "Größe 2012 \t\n  漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_end_token_of_the_file_ends_an_answer(prepared: Path) -> None:
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(prepared / "out").eos_token_id == [3, 2]


def test_the_advised_sampling_stands_in_the_generation_config(prepared: Path) -> None:
    content = json.loads((prepared / "out" / "generation_config.json").read_text())
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [content[name] for name in names] == [0.25, 0.5, 30, 0.125, 1.5]
    assert content["eos_token_id"] == [3, 2]


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "in.gguf", architecture="from_the_future")
    told = r"its architecture 'from_the_future' is not read; known are .*llama.* Use the model's safetensors folder"
    with pytest.raises(Unreadable, match=told):
        describe(source)


def test_what_cannot_be_served_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelRefused("layer 0 is a plane")

    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr("engine.model.rehearsal.probe", refuse)
    with pytest.raises(ModelRefused, match="llama: layer 0 is a plane; decoders"):
        prepare(write_tiny_gguf(tmp_path / "in.gguf"), target)
    assert list(target.iterdir()) == []


def test_the_library_reads_the_tokenizer_as_it_was_written(prepared: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(prepared / "out")
    assert loaded.backend_tokenizer.encode("x2012").tokens == ["x", "2", "0", "1", "2"]
    assert loaded.convert_tokens_to_ids("<｜User｜>") == 1


def test_the_weights_stay_in_the_file(prepared: Path) -> None:
    """What the folder holds beside the link is small, and what is loaded are the file's numbers."""
    folder = prepared / "out"
    link = folder / GGUF_LINK
    assert link.resolve() == prepared / "in.gguf"
    assert sum(path.stat().st_size for path in folder.iterdir() if path != link) < 50_000
    module = load_model(EngineConfig(path=str(folder), device="cpu"), lambda *_: None).module
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(prepared / "in.gguf").tensors}
    np.testing.assert_array_equal(
        module.model.layers[1].mlp.down_proj.weight.detach().numpy(), stored["blk.1.ffn_down.weight"]
    )
    queries = stored["blk.0.attn_q.weight"].reshape(HEADS, -1, 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    np.testing.assert_array_equal(module.model.layers[0].self_attn.q_proj.weight.detach().numpy(), queries)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    source, target = write_tiny_gguf(tmp_path / "in.gguf"), tmp_path / "out"
    target.mkdir()
    prepare(source, target)
    assert folder_problem(target) is None
    source.unlink()
    assert folder_problem(target) == f"{target} was prepared from {source}, which is gone; put the file back"


def test_files_beside_it_are_not_read(tmp_path: Path) -> None:
    """A tokenizer or a configuration of another model, in the folder where the file lies."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_text('{"added_tokens": [], "chat_template": "of another"}')
    target = tmp_path / "out"
    target.mkdir()
    prepare(write_tiny_gguf(tmp_path / "in.gguf", metadata={"tokenizer.chat_template": "its own"}), target)
    assert (target / "chat_template.jinja").read_text() == "its own"
    assert tokenizer_of(target).get_vocab_size() == 3 + 256 + 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "from-the-future"}, "tokenizer.ggml.pre is 'from-the-future'"),
        ({"metadata": {"llama.rope.scaling.type": "zigzag"}}, "its rotary scaling 'zigzag' is not known"),
        ({"tensors": {"rope_freqs.weight": np.full(4, 3, np.float32)}}, "not the factors of Llama 3"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "that LlamaForCausalLM has no place for"),
        ({"metadata": {"llama.attention.key_length": 16}}, r"as \[64, 32\], but its tensor is \[32, 32\]"),
        ({"metadata": {"llama.block_count": 3}}, "it has no tensor for model.layers.2.input_layernorm.weight"),
        ({"metadata": {"llama.attention.head_count": 0}}, "describes no decoder"),
        ({"metadata": {"llama.context_length": "long"}}, "its llama.context_length is 'long', not a whole number"),
    ],
)
def test_what_would_be_another_model_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(ModelRefused, match=reason):
        prepare(write_tiny_gguf(tmp_path / "in.gguf", **changes), target)
    assert list(target.iterdir()) == []


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "in.gguf", pre="from-the-future")
    done = run_preparation(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error tokenizer.ggml.pre is 'from-the-future'")


def test_a_panic_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Panic(BaseException):
        """As Rust code panics: no ``Exception``."""

    def panic(*_: Path) -> None:
        raise Panic("index out\nof bounds")

    monkeypatch.setattr(preparation, "prepare", panic)
    monkeypatch.setattr(sys, "argv", ["engine.gguf.prepare", "in.gguf", str(tmp_path)])
    assert preparation.main() == 1
    assert capsys.readouterr().out == "error index out of bounds\n"


def test_the_prefix_space_follows_the_file() -> None:
    described = {
        "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"},
        "added_tokens": [],
        "model": {"vocab": {}},
    }
    repair_tokenizer(described, {"tokenizer.ggml.tokens": [], "tokenizer.ggml.add_space_prefix": True})
    assert described["pre_tokenizer"]["prepend_scheme"] == "first"  # type: ignore[index]
    repair_tokenizer(described, {"tokenizer.ggml.tokens": [], "tokenizer.ggml.add_space_prefix": False})
    assert described["pre_tokenizer"]["prepend_scheme"] == "never"  # type: ignore[index]


@pytest.mark.reference
def test_the_builtin_model_reads_as_its_file_says(builtin_model: Path, cache_dir: Path) -> None:
    entry = yaml.safe_load((ROOT / "models.yaml").read_text())["models"]["smollm2-135m-instruct"]
    metadata = read_header(cache_dir / "files" / f"{entry['sha256']}.gguf").metadata
    tokenizer = tokenizer_of(builtin_model)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert [tokenizer.id_to_token(i) for i in range(len(tokens))] == tokens
    control = {i for i, kind in enumerate(types) if kind == 3}
    assert {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} == control
    assert (builtin_model / "chat_template.jinja").read_text() == metadata["tokenizer.chat_template"]
    assert tokenizer.encode("In 2026").tokens == ["In", "Ġ", "2", "0", "2", "6"]
    assert tokenizer.encode("Hi").ids == tokenizer.encode("Hi", add_special_tokens=False).ids
