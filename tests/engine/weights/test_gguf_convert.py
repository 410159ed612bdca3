"""GGUF files: what transformers' conversion gets wrong is put right, and what cannot be put right is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from support.gguf_files import write_tiny_gguf
from tokenizers import Tokenizer

from engine.api.errors import ModelRefused

ROOT = Path(__file__).parents[3]


def run_converter(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    target.mkdir()
    command = [sys.executable, "-m", "engine.weights.gguf_convert", str(source), str(target)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose third control token has characters that a byte-level vocabulary spells otherwise."""
    place = tmp_path_factory.mktemp("converted")
    control = ("<|endoftext|>", "<｜User｜>", "<|eot|>", "<|end|>")
    sampling = {"temp": 0.25, "top_k": 30, "top_p": 0.5, "min_p": 0.125, "penalty_repeat": 1.5, "mirostat": 2}
    advised = {f"general.sampling.{name}": value for name, value in sampling.items()}
    metadata = {"tokenizer.ggml.eot_token_id": 2, **advised}
    source = write_tiny_gguf(place / "in.gguf", control=control, metadata=metadata)
    done = run_converter(source, place / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "progress 1.00"
    return place


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_digits_are_split_one_by_one(converted: Path) -> None:
    """The merges hold "20" and "12", which this family's cut never lets come together."""
    assert tokenizer_of(converted / "out").encode("x2012").tokens == ["x", "2", "0", "1", "2"]


def test_a_control_token_of_any_spelling_is_one_special_token(converted: Path) -> None:
    tokenizer = tokenizer_of(converted / "out")
    assert tokenizer.encode("<｜User｜>a").ids[0] == 1
    assert tokenizer.decode([1], skip_special_tokens=False) == "<｜User｜>"
    assert tokenizer.decode([1], skip_special_tokens=True) == ""
    assert tokenizer.get_vocab_size() == 4 + 256 + 2


def test_every_byte_survives_the_round_trip(converted: Path) -> None:
    tokenizer = tokenizer_of(converted / "out")
    text = "Größe 2012 \t\n  漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_end_token_of_the_file_ends_an_answer(converted: Path) -> None:
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(converted / "out").eos_token_id == [3, 2]


def test_the_advised_sampling_stands_in_the_generation_config(converted: Path) -> None:
    content = json.loads((converted / "out" / "generation_config.json").read_text())
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [content[name] for name in names] == [0.25, 0.5, 30, 0.125, 1.5]
    assert content["eos_token_id"] == [3, 2]


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("from_the_future", "its architecture 'from_the_future' is not read"),
        ("granite", "its architecture 'granite' is not read"),
    ],
)
def test_an_architecture_that_is_not_read_is_named(architecture: str, told: str, tmp_path: Path) -> None:
    from engine.weights.gguf_convert import Unconvertible, read_header

    source = write_tiny_gguf(tmp_path / "in.gguf", architecture=architecture)
    with pytest.raises(Unconvertible, match=told) as refusal:
        read_header(source)
    assert "use the model's safetensors folder" in str(refusal.value)


def test_blocks_that_cannot_be_unpacked_are_named_by_their_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.weights import gguf_convert as converter

    kinds = gguf.GGMLQuantizationType
    assert all(map(converter.can_unpack, (kinds.Q4_0, kinds.Q8_0, kinds.Q4_K, kinds.Q6_K, kinds.IQ4_XS)))
    assert not any(map(converter.can_unpack, (kinds.Q8_1, kinds.Q8_K)))
    source = write_tiny_gguf(tmp_path / "in.gguf")
    monkeypatch.setattr(converter, "FLOATS", frozenset())
    monkeypatch.setattr(converter, "can_unpack", lambda kind: False)
    with pytest.raises(converter.Unconvertible, match=r"its weights are in F32, which cannot be unpacked; take a file"):
        converter.read_header(source)


@pytest.mark.parametrize(
    ("name", "found", "told"),
    [
        ("engine.model.rehearsal.probe", ModelRefused("layer 0 is a plane"), "llama: layer 0 is a plane; decoders"),
        ("engine.weights.gguf_convert.total_bytes", 4 * 28992 - 1, "28992 weights take 113.2 KiB of memory in float32"),
        ("shutil.disk_usage", SimpleNamespace(free=7), "take 113.2 KiB on disk in float32, and 7 bytes are free there"),
    ],
    ids=["layers", "memory", "disk"],
)
def test_what_cannot_be_served_is_refused_before_it_is_converted(
    name: str, found: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.weights.gguf_convert import convert

    def answer(*_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    source, target = write_tiny_gguf(tmp_path / "in.gguf"), tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr(name, answer)
    with pytest.raises(ModelRefused, match=told):
        convert(source, target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_said_to_be(converted: Path, tmp_path: Path, share: float) -> None:
    from engine.weights.gguf_convert import Unconvertible, convert

    whole = (converted / "in.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    (tmp_path / "out").mkdir()
    with pytest.raises(Unconvertible, match=r"^the file is cut off or damaged: it should have at least "):
        convert(tmp_path / "cut.gguf", tmp_path / "out")


def test_the_library_reads_the_tokenizer_as_it_was_written(converted: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(converted / "out")
    assert loaded.backend_tokenizer.encode("x2012").tokens == ["x", "2", "0", "1", "2"]
    assert loaded.convert_tokens_to_ids("<｜User｜>") == 1


def test_the_weights_are_those_of_the_file(converted: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted / "out", dtype="auto")
    assert model.dtype == torch.float32
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(converted / "in.gguf").tensors}
    loaded = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(loaded, stored["blk.1.ffn_down.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "from-the-future"}, "'from-the-future'"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rotary scaling factors"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    from engine.weights.gguf_convert import ARRAYS, Unconvertible, check_convertible, read_gguf_metadata

    source = write_tiny_gguf(tmp_path / "in.gguf", **changes)
    with pytest.raises(Unconvertible, match=reason):
        check_convertible(*read_gguf_metadata(str(source), ARRAYS))


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "in.gguf", pre="from-the-future")
    done = run_converter(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error tokenizer.ggml.pre is 'from-the-future'")


def test_a_panic_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from engine.weights import gguf_convert as converter

    class Panic(BaseException):
        """As Rust code panics: no ``Exception``."""

    def panic(*_: Path) -> None:
        raise Panic("index out\nof bounds")

    monkeypatch.setattr(converter, "convert", panic)
    monkeypatch.setattr(converter, "share_readers", lambda: None)
    monkeypatch.setattr(sys, "argv", ["engine.weights.gguf_convert", "in.gguf", str(tmp_path)])
    assert converter.main() == 1
    assert capsys.readouterr().out == "error index out of bounds\n"


def test_the_prefix_space_follows_the_file() -> None:
    from engine.weights.gguf_convert import repair_tokenizer

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
    import yaml

    from engine.weights.gguf_convert import read_gguf_metadata

    entry = yaml.safe_load((ROOT / "models.yaml").read_text())["models"]["smollm2-135m-instruct"]
    metadata, _ = read_gguf_metadata(str(cache_dir / "files" / f"{entry['sha256']}.gguf"), ("tokenizer.ggml.tokens",))
    tokenizer = tokenizer_of(builtin_model)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert [tokenizer.id_to_token(i) for i in range(len(tokens))] == tokens
    control = {i for i, kind in enumerate(types) if kind == 3}
    assert {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} == control
    assert (builtin_model / "chat_template.jinja").read_text() == metadata["tokenizer.chat_template"]
    assert tokenizer.encode("In 2026").tokens == ["In", "Ġ", "2", "0", "2", "6"]
    assert tokenizer.encode("Hi").ids == tokenizer.encode("Hi", add_special_tokens=False).ids
