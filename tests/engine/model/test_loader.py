"""Which models are loaded, what they say of themselves, and which are refused and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.digests import make_request, run_to_end
from support.paged import make_sequence
from support.tiny import EOS_ID, save_tiny_tokenizer, tiny_model_folder
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine.api.block_groups import BlockGroup, Window
from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.api.events import ErrorKind
from engine.build import build_core, build_runner, load_tokenizer
from engine.model.loader import load_model
from engine.rope import long_rope
from engine.scheduling.sequence import ScheduledChunk


def _silent(stage: str, done: float) -> None:
    pass


def _load(folder: Path, **config: Any) -> Any:
    return load_model(EngineConfig(path=str(folder), device="cpu", **config), _silent)


def _save(folder: Path, auto: Any, model_type: str, **config: Any) -> Path:
    auto.from_config(CONFIG_MAPPING[model_type](**config)).save_pretrained(folder)
    return folder


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("mamba", {"state_size": 4}, r"layer 0 of mamba \(MambaBlock.*attention interface"),
        ("bloom", {}, r"layer 0 of bloom \(BloomBlock.*attention interface"),
        ("falcon", {"alibi": True}, r"layer 0 of falcon \(FalconDecoderLayer.*attention interface"),
        ("bert", {"intermediate_size": 32}, r"attention mask is neither causal"),
    ],
)
def test_what_pages_cannot_carry_is_refused_by_name(
    model_type: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    _save(tmp_path, AutoModelForCausalLM, model_type, **TINY, **config)
    with pytest.raises(ModelRefused, match=reason):
        _load(tmp_path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, AutoModelForSeq2SeqLM, "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ModelRefused, match="t5 is an encoder-decoder"):
        _load(tmp_path)


def test_models_that_do_not_continue_text_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, AutoModel, "distilbert", vocab_size=64, dim=32, hidden_dim=32, n_layers=1, n_heads=2)
    with pytest.raises(ModelRefused, match="distilbert is not a causal language model"):
        _load(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    _edit_config(folder, quantization_config={"quant_method": "quip", "bits": 4})
    with pytest.raises(ModelRefused, match=r"quantised weights .*quip.* are not loaded"):
        _load(folder)


def test_missing_weights_are_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"lacks 1 weights.*layers.1.mlp.up_proj"):
        _load(folder)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors" * 10**5)
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        _load(folder)


def test_folders_without_config_or_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"config\.json"):
        _load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelRefused, match="safetensors"):
        _load(tmp_path)


def test_a_model_that_cannot_compute_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not fit\nand a trace")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
    with pytest.raises(ModelRefused, match=r"LlamaForCausalLM cannot compute .*: shapes do not fit$"):
        load_model(EngineConfig(path=str(tiny_model_folder(tmp_path)), device="cpu"), _silent)


def test_unknown_model_types_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    _edit_config(folder, model_type="unheard_of", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelRefused, match="not understood"):
        _load(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"max_context": 513}, "513.*1 to 512"),
        ({"max_context": 0}, "0.*1 to 512"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_settings_that_the_model_cannot_have_are_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=reason):
        _load(tiny_model_folder(tmp_path), **config)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_devices_that_are_not_here_are_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=f"device '{device}'"):
        load_model(EngineConfig(path=str(tiny_model_folder(tmp_path)), device=device), _silent)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}


def test_texts_beyond_the_original_context_are_rotated_by_themselves(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=128)
    loaded = _load(folder)
    assert (loaded.max_context, loaded.limit) == (512, "")
    assert loaded.long_rope is not None
    assert loaded.long_rope.original == 128
    within = _load(folder, max_context=128)
    assert (within.max_context, within.long_rope) == (128, None)


def test_rotations_that_cannot_stand_side_by_side_are_refused_beyond_the_original_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=128)
    monkeypatch.setattr(long_rope._Rotations, "of", lambda rotations, is_long: rotations.short)
    with pytest.raises(ModelRefused, match=r"rotary_emb \(Phi3RotaryEmbedding\).*set max_context to 128 or less"):
        _load(folder)
    assert _load(folder, max_context=128).max_context == 128


def test_the_text_part_of_a_composite_model_is_served(tmp_path: Path) -> None:
    text = {
        **TINY,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model_config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path)
    layers = _load(tmp_path).probe.layers
    assert [layer.window for layer in layers] == [Window(8), None]
    assert all("language_model" in layer.name for layer in layers)


def test_model_info_tells_what_was_loaded(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    config = EngineConfig(path=str(folder), device="cpu", block_size=8, max_running=4, threads=1)
    stages: list[tuple[str, float]] = []
    info = build_runner(config, lambda stage, done: stages.append((stage, done)), load_tokenizer(folder)).info
    assert (info.model_type, info.dtype, info.device) == ("llama", "float32", "cpu")
    assert info.vocab_size == 320
    assert (info.max_context, info.block_size, info.groups) == (512, 8, (BlockGroup(4 * 512 // 8),))
    assert info.eos_ids == (EOS_ID,)
    assert info.num_parameters > 0
    assert ("loading weights", 0.0) in stages
    assert ("loading weights", 1.0) in stages
    assert all(0 <= done <= 1 for _, done in stages)


def test_the_end_tokens_of_all_sources_count(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": [5, 7, 100000]}))
    config = EngineConfig(path=str(folder), device="cpu", kv_memory=1e6)
    assert build_runner(config, _silent, load_tokenizer(folder)).info.eos_ids == (EOS_ID, 5, 7)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 10**5])
def test_a_broken_tokenizer_config_is_refused(text: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(text)
    config = EngineConfig(path=str(folder), device="cpu", kv_memory=1e6)
    with pytest.raises(ModelRefused, match=r"tokenizer_config\.json cannot be read as a JSON object"):
        build_runner(config, _silent, load_tokenizer(folder))


def test_a_small_cache_shortens_the_context(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    per_token = 2 * 2 * 2 * 16 * 4
    config = EngineConfig(path=str(folder), device="cpu", kv_memory=float(100 * per_token), threads=1)
    core = build_core(config, _silent)
    assert core.stats().total_blocks == 100 // 16


def test_half_precision_logits_come_as_float32(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    config = EngineConfig(path=str(folder), device="cpu", dtype="bfloat16", kv_memory=1e6)
    runner = build_runner(config, _silent, load_tokenizer(folder))
    logits = runner.forward(
        [ScheduledChunk(make_sequence([5, 6, 7], [0]), 0, 3), ScheduledChunk(make_sequence([5, 6, 7], [1]), 0, 2)]
    )
    assert (logits.dtype, logits.shape) == (torch.float32, (1, 320))
    assert runner.info.dtype == "bfloat16"


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="tokenizer"):
        load_tokenizer(tmp_path)
    save_tiny_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab_size() == 259


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # Rust code panics
        {"type": "Unheard of"},
        [[]] * 10**5,
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(normalizer: Any, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": normalizer}))
    with pytest.raises(ModelRefused, match=r"^.* holds no tokenizer that can be read: .*$") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_panics_where_grammars_are_prepared_costs_the_grammars(tmp_path: Path) -> None:
    """Pieces of no length panic wherever a text is read; the tokens of prompts come from elsewhere."""
    folder = tiny_model_folder(tmp_path)
    path = folder / "tokenizer.json"
    broken = {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    core = build_core(EngineConfig(path=str(folder), device="cpu", kv_memory=1e6, threads=1), _silent)
    told = run_to_end(core, make_request("r", grammar='start: "abc"'), make_request("free"))
    assert told["r"].done is not None
    assert told["r"].done.error is not None
    assert told["r"].done.error.kind is ErrorKind.REFUSED
    assert "backtrace" not in told["r"].done.error.message
    assert told["free"].done is not None
    assert told["free"].done.error is None


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
