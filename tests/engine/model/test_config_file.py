"""A config.json that a stranger wrote: no number of it is built, no code that it names is fetched."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from support.tiny import tiny_model_folder
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.model.config_file import MAX_BYTES, read_config
from engine.model.loader import load_model

BILLION = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), "qwen3")


def changed(model: Path, folder: Path, **changes: Any) -> Path:
    """The model with another config.json."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **changes}))
    return folder


def load(folder: Path) -> Any:
    return load_model(EngineConfig(path=str(folder), device="cpu"), lambda *_: None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": BILLION}, "num_hidden_layers in .* is 1000000000; at most 1000 is served"),
        ({"num_hidden_layers": float(BILLION)}, "num_hidden_layers in .* is 1000000000; at most 1000 "),
        ({"num_hidden_layers": -BILLION}, "num_hidden_layers in .* is -1000000000; at most 1000 "),
        ({"vocab_size": BILLION}, "vocab_size in .* is 1000000000; at most 67108864 "),
        ({"hidden_size": 10**4000}, "hidden_size in .* is a number of 4001 digits; at most 67108864 "),
        ({"intermediate_size": float("inf")}, "intermediate_size in .* is inf; at most"),
        ({"num_experts": BILLION}, "num_experts in .* is 1000000000; at most 65536 "),
        ({"num_attention_heads": BILLION}, "num_attention_heads in .* is 1000000000; at most 65536 "),
        ({"num_labels": BILLION}, "num_labels in .* is 1000000000; at most 1048576 "),
        ({"max_position_embeddings": 2**60}, "max_position_embeddings in .* at most 9007199254740992 "),
        ({"layer_types": ["full_attention"] * 1001}, "layer_types in .* is a list of 1001; at most 1000 "),
        ({"text_config": {"num_hidden_layers": BILLION}}, "num_hidden_layers in .* is 1000000000"),
        ({"parts": [{"n_layer": BILLION}]}, "n_layer in .* is 1000000000"),
        ({"hidden_size": 2**20}, "cannot be built|describes .* weights, but its .* have .* bytes"),
        ({"vocab_size": 2**24}, "describes [0-9]+ weights, but its .* have .* bytes"),
        ({"num_hidden_layers": 900, "layer_types": None}, "describes .* weights, but its .* have .* bytes"),
        ({"num_attention_heads": 0}, "cannot be built|not understood"),
        ({"hidden_size": "much"}, "not understood"),
    ],
)
def test_absurd_numbers_are_refused_in_one_sentence(
    changes: dict[str, Any], told: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelRefused, match=told) as refusal:
        load(changed(model, tmp_path, **changes))
    assert "\n" not in str(refusal.value)


def test_no_family_is_refused_for_its_usual_numbers(tmp_path: Path) -> None:
    """Of all that continue text and that transformers can make without being told any number."""
    refused: list[str] = []
    families = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            text = CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except (ValueError, StrictDataclassError):
            continue
        families += 1
        (tmp_path / "config.json").write_text(text)
        try:
            read_config(tmp_path)
        except ModelRefused as refusal:
            refused.append(str(refusal))
    assert families > 100
    assert [problem for problem in refused if "at most" in problem] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"a": ' * 100_000, "cannot be read as JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
    ],
)
def test_what_is_no_object_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelRefused, match=told):
        read_config(tmp_path)


def test_a_billion_types_of_layers_are_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(20 * BILLION)  # takes no room
    with pytest.raises(ModelRefused, match=f"has 20000000000 bytes; at most {MAX_BYTES} are read"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("part", ["", "text_config"])
def test_no_code_for_attention_is_fetched(
    key: str, part: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def connect(*address: Any, **_: Any) -> Any:
        tried.append(address)
        raise OSError("no network here")

    named: dict[str, Any] = {key: "kernels-community/flash-attn"}
    if part:
        text = json.loads((model / "config.json").read_text())
        folder = composite(tmp_path / "composite", text, named)
    else:
        folder = changed(model, tmp_path, **named)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    assert load(folder).probe.layers
    assert tried == []


def composite(folder: Path, text: dict[str, Any], named: dict[str, Any]) -> Path:
    """A model of text and images whose text part holds what is ``named``."""
    from transformers import AutoModelForCausalLM

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](
        text_config={**{name: text[name] for name in sizes}, "num_hidden_layers": 1},
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        mm_tokens_per_image=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"] |= named
    (folder / "config.json").write_text(json.dumps(saved))
    return folder
