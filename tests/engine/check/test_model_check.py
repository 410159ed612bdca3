"""What configurations of published models tell, of which no weight is here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_files import write_tiny_gguf
from support.tiny import tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.model_report import ModelReport, report_from
from engine.check.model_check import _stored, report_on
from engine.device import device_memory
from engine.model.config_file import read_config

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB of memory, all free."""
    have(monkeypatch, 64 * GIB)


def have(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(device_memory, name, lambda: memory)
    monkeypatch.setattr("engine.platforms.machine.available_bytes", lambda: memory)


def looked_at(folder: Path, name: str, **settings: Any) -> ModelReport:
    """The report on a folder with nothing but the config.json of a published model."""
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return report_on(EngineConfig(**{"path": str(folder), "device": "cpu", **settings}))


def described(folder: Path, **changes: Any) -> Path:
    """A folder with the config.json of a Qwen3 with two layers, changed."""
    content = json.loads((CONFIGS / "Qwen3-0.6B.json").read_text()) | {"num_hidden_layers": 2} | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def short(folder: Path, **settings: Any) -> ModelReport:
    return report_on(EngineConfig(**{"path": str(described(folder)), "device": "cpu", **settings}))


def test_a_context_that_ends_with_a_rotation_says_so(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
    found = report_on(EngineConfig(str(described(tmp_path, rope_scaling=rope)), device="cpu"))
    assert (found.longest_context, found.context) == (4096, 4096)
    assert found.context_limit.startswith("its rotary embedding is dynamic: beyond 4096 tokens")


def test_longrope_leaves_the_context_whole_and_c_code_the_original_one(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}
    folder = described(tmp_path, rope_scaling={"rope_type": "longrope", "rope_theta": 1e6, **factors})
    found = report_on(EngineConfig(str(folder), device="cpu"))
    assert (found.problem, found.longest_context, found.context_limit) == ("", 40_960, "")
    assert "beyond 4096 tokens its texts are rotated by other factors" in found.not_native
    assert report_on(EngineConfig(str(folder), device="cpu", max_context=4096)).native


@pytest.mark.parametrize(
    ("name", "count", "active", "layers", "per_token"),
    [
        ("Qwen3-0.6B", 596_049_920, None, [("full attention", 28)], 28 * 8 * 2 * 128 * 2),
        ("Llama-3.1-8B", 8_030_261_248, None, [("full attention", 32)], 32 * 8 * 2 * 128 * 2),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704, [("full attention", 48)], 48 * 4 * 2 * 128 * 2),
        (
            "gemma-3-1b-it",
            999_885_952,
            None,
            [("sliding window of 512", 22), ("full attention", 4)],
            26 * 1 * 2 * 256 * 2,
        ),
    ],
    ids=["qwen3", "llama3", "moe", "gemma3"],
)
def test_published_numbers_are_found(
    tmp_path: Path, name: str, count: int, active: int | None, layers: list[tuple[str, int]], per_token: int
) -> None:
    """Of parameters, as the models' makers state them, and of keys and values by hand."""
    found = looked_at(tmp_path, name, dtype="bfloat16", max_context=1000)
    assert found.problem == found.undecided == ""
    assert (found.parameters, found.active_parameters) == (count, active)
    assert sorted(found.layers) == sorted(layers)
    assert (found.weights_dtype, found.weights_bytes) == ("bfloat16", 2 * count)
    assert found.kv_bytes_per_token == per_token
    # Of 1,000 tokens in blocks of 16; what a window of 512 sees and the next token touch 34.
    blocks = sum(number * (34 if "window" in kind else 63) for kind, number in layers) / sum(dict(layers).values())
    assert (found.context, found.block_size, found.context_bytes) == (1000, 16, round(blocks * 16 * per_token))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "mamba-130m-hf",
            "layer 0 of mamba (MambaBlock: MambaMixer, MambaRMSNorm) does not send its attention through",
        ),
        ("whisper-tiny", "whisper is an encoder-decoder; only decoder models are served"),
        ("t5-small", "t5 is an encoder-decoder; only decoder models are served"),
        (
            "bert-base-uncased",
            "BertForMaskedLM: the model's attention mask is neither causal nor causal with the configured sliding "
            "window or chunks; decoders with full or sliding attention, gated",
        ),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, name: str, told: str) -> None:
    found = looked_at(tmp_path, name)
    assert found.refused.startswith(told)
    assert "\n" not in found.refused
    assert found.class_name == json.loads((CONFIGS / f"{name}.json").read_text())["architectures"][0]


def test_towers_are_named_and_the_text_part_is_measured(tmp_path: Path) -> None:
    found = looked_at(tmp_path, "gemma-3-4b-it", dtype="bfloat16")
    assert found.inputs == ("text", "image")
    assert found.parameters == 4_300_079_472
    assert found.layers == (("sliding window of 1024", 29), ("full attention", 5))
    assert short(tmp_path).inputs == ("text",)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_states_are_told_in_the_type_of_the_weights(tmp_path: Path, dtype: str, size: int) -> None:
    """Each of ten convolutions over three tokens keeps two."""
    assert looked_at(tmp_path, "LFM2.5-1.2B-Instruct", dtype=dtype).state_bytes == 10 * 2 * 2048 * size


def test_how_it_is_computed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = short(tmp_path)
    assert (found.native, found.not_native) == (True, "")
    found = short(tmp_path, dtype="bfloat16")
    assert (found.native, found.not_native) == (False, "it computes in torch.bfloat16 on cpu, not in float32 on a CPU")
    assert short(tmp_path, native=False).not_native == "native is off in the configuration"
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert short(tmp_path).not_native == "there is no C compiler; install gcc or clang"


def test_a_model_larger_than_the_machine_is_one_sentence_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 20 * GIB)
    found = looked_at(tmp_path, "Llama-3.1-8B")
    assert found.too_large == (
        "its 8030261248 weights take 29.9 GiB in float32, which do not fit: of 20.0 GiB for this process, 20.0 GiB are "
        "available; serve a smaller model, or halve its weights with dtype: bfloat16"
    )
    assert found.problem == found.too_large
    assert looked_at(tmp_path, "Llama-3.1-8B", dtype="bfloat16").problem == ""
    # Of this one the configuration tells the type of the text model only.
    assert looked_at(tmp_path, "gemma-4-E4B-it").too_large.startswith(
        "its 7463013376 weights take 27.8 GiB in float32, "
    )


def test_the_context_that_fits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = short(tmp_path)
    assert found.kv_bytes_per_token is not None
    assert found.cache_tokens == 2 * GIB // (16 * found.kv_bytes_per_token) * 16, "2 GiB at most on a CPU"
    have(monkeypatch, 4 * GIB)
    assert 0 < (short(tmp_path).cache_tokens or 0) < found.cache_tokens


def test_a_context_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert short(tmp_path, max_context=40_960).context == 40_960
    found = short(tmp_path, max_context=40_961)
    assert found.refused == "max_context is 40961, but qwen3 allows 1 to 40960 tokens"
    assert (found.longest_context, found.class_name) == (40_960, "Qwen3ForCausalLM")


def test_a_device_that_is_not_here_is_no_refusal_of_the_model(tmp_path: Path) -> None:
    found = short(tmp_path, device="cuda:99")
    assert (found.refused, found.too_large, found.class_name) == ("", "", "Qwen3ForCausalLM")
    assert found.problem == found.no_device
    assert "device 'cuda:99' is not available" in found.no_device


def test_the_type_of_weights_that_are_not_here_is_told_by_their_size(tmp_path: Path) -> None:
    config = read_config(described(tmp_path, dtype=None))
    assert _stored(tmp_path, config, False, 1000, 2000) is torch.bfloat16
    assert _stored(tmp_path, config, False, 1000, 4000) is torch.float32
    assert _stored(tmp_path, read_config(described(tmp_path, dtype="float16")), False, 1000, 4000) is torch.float16


def test_weights_that_would_be_too_few_are_refused(tmp_path: Path) -> None:
    less = report_on(EngineConfig(path=str(described(tmp_path)), device="cpu"), 1000)
    assert "its *.safetensors have 1000 bytes; they do not belong to the same model" in less.refused


def test_quantised_weights_take_what_their_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss 20B, whose experts are published in MXFP4: 20.9 billion weights in 13.8 GB."""
    unknown = looked_at(tmp_path, "gpt-oss-20b")
    assert (unknown.problem, unknown.weights_bytes, unknown.weights_by_choice) == ("", None, ())
    size = 13_761_264_768
    found = report_on(EngineConfig(path=str(tmp_path), device="cpu"), size)
    assert (found.problem, found.weights_bytes, found.weights_dtype) == ("", size, "MXFP4")
    assert (
        report_on(EngineConfig(path=str(tmp_path), device="cpu", native=False), size).weights_bytes
        == 4 * 20_914_757_184
    )
    have(monkeypatch, 12 * GIB)
    assert (
        "take 12.8 GiB in blocks, which do not fit"
        in report_on(EngineConfig(str(tmp_path), device="cpu"), size).problem
    )
    asked = report_on(EngineConfig(str(tmp_path), device="cpu", quantize="q8"), size)
    assert asked.refused.startswith("quantize is 'q8', but the weights are quantised already (MXFP4)")


def test_each_choice_of_quantize_says_what_it_takes(tmp_path: Path) -> None:
    found = looked_at(tmp_path, "Qwen3-0.6B")
    vocabulary, vectors = 151_936 * 1024, 28 * (2 * 1024 + 2 * 128) + 1024
    maps = found.parameters - vocabulary - vectors  # the head is the embedding
    expected = {
        "none": 4 * found.parameters,
        "q8": (vocabulary + maps) // 32 * 34 + 4 * vectors,
        "q4": vocabulary // 32 * 34 + maps // 32 * 18 + 4 * vectors,
    }
    assert expected.items() <= dict(found.weights_by_choice).items()
    assert looked_at(tmp_path, "Qwen3-0.6B", quantize="q4").weights_bytes == expected["q4"]
    assert looked_at(tmp_path, "Qwen3-0.6B", dtype="bfloat16").weights_by_choice == ()
    refused = looked_at(tmp_path, "Qwen3-0.6B", quantize="q4", dtype="bfloat16").refused
    assert (
        "quantize is 'q4', but only the C code computes with blocks, in float32; leave dtype and native out" in refused
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in .* is 1000000000; at most 1000 is served"),
        ({"hidden_size": 1 << 26, "intermediate_size": 1 << 26}, "describes [0-9]+ weights; no model has so many"),
        ({"hidden_size": "much"}, "not understood"),
        ({"num_attention_heads": 0}, "cannot be built|not understood"),
        ({"model_type": "unheard_of"}, "not understood"),
        ({"quantization_config": {"quant_method": "quip"}}, r"quantised weights .*quip\) are not loaded; take the"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value),
)
def test_a_hostile_configuration_is_one_sentence(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    found = report_on(EngineConfig(path=str(described(tmp_path, **changes)), device="cpu"))
    assert re.search(told, found.refused), found.refused
    assert "\n" not in found.refused


def test_a_prepared_folder_and_a_gguf_file_are_read(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "tiny", "qwen3")
    found = report_on(EngineConfig(path=str(folder), device="cpu"))
    assert (found.problem, found.parameters, found.weights_dtype) == ("", 102_784, "float32")
    details = tmp_path / "details"
    details.mkdir()
    metadata = {"tokenizer.chat_template": "{{ messages }}", "general.sampling.temp": 0.25}
    file = write_tiny_gguf(tmp_path / "a file", metadata=metadata)
    found = report_on(EngineConfig(path=str(file), device="cpu"), None, details)
    assert (found.problem, found.class_name, found.layers) == ("", "LlamaForCausalLM", (("full attention", 2),))
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {p.name for p in details.iterdir()}
    assert json.loads((details / "generation_config.json").read_text()) == {"temperature": 0.25, "eos_token_id": [2]}


def test_a_report_survives_its_way_between_processes(tmp_path: Path) -> None:
    found = short(tmp_path)
    assert report_from(json.loads(json.dumps(found.as_json()))) == found
