"""Repositories of a hub on the loopback: what is refused by which files, and which files are fetched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from support.small_hub import SmallHub, running_hub
from support.tiny import tiny_model_folder

from engine.api.engine import EngineConfig
from engine.api.errors import SourceError
from engine.api.model_report import ModelReport
from engine.weights import sources
from engine.weights.hub import SMALL_FILES, look
from engine.weights.sources import HubSource, inspect, prepare, prepared_folder

MODEL = HubSource("org/model")
CONFIGS = Path(__file__).parents[2] / "data" / "configs"
DISTRACTIONS: dict[str, bytes | int] = dict.fromkeys(
    (
        "README.md",
        "original/consolidated.00.pth",
        "original/params.json",
        "original/model.safetensors",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "model.fp16.safetensors",
        "model.fp16.safetensors.index.json",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "onnx/model.onnx",
        "onnx/config.json",
        "model.gguf",
        "code.py",
    ),
    b"{}",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SmallHub]:
    with running_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a tiny model."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), "qwen3")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(hub: SmallHub, files: dict[str, bytes | int], cache: Path) -> str:
    hub.repositories["org/model"] = files
    with pytest.raises(SourceError) as caught:
        prepare(MODEL, None, cache, lambda *_: None)
    assert [path for path in hub.bodies if "safetensors" in path and not path.endswith(".json")] == []
    assert "\n" not in str(caught.value)
    assert prepared_folder(MODEL, None, cache) is None
    return str(caught.value)


def test_exactly_the_files_of_the_model_are_fetched(hub: SmallHub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["org/model"] = {**DISTRACTIONS, **files}
    steps: list[str] = []
    folder = prepare(MODEL, None, tmp_path, lambda step, _: steps.append(step))
    assert sorted(hub.bodies) == sorted(files)
    assert hub.bodies[-1] == "model.safetensors", "after all that decides"
    assert steps == ["check", "download", "download"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    hub.requests.clear()
    assert prepare(MODEL, None, tmp_path, lambda *_: None) == folder
    assert hub.requests == []


def test_the_index_names_the_weights(hub: SmallHub, files: dict[str, bytes], tmp_path: Path) -> None:
    parts = {f"model-0000{part}-of-00002.safetensors": b"part %d" % part for part in (1, 2)}
    index = {"metadata": {}, "weight_map": dict(zip("ab", parts, strict=True))}
    small = {name: content for name, content in files.items() if name != "model.safetensors"}
    hub.repositories["org/model"] = {
        **DISTRACTIONS,
        **small,
        **parts,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00003-of-00003.safetensors": b"of another time",
    }
    found = look("org/model", tmp_path)
    assert not set(hub.bodies) & parts.keys()
    found.fetch_weights()
    assert sorted(hub.bodies) == sorted([*small, *parts, "model.safetensors.index.json"])


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        (
            {"a": "original/model.safetensors"},
            "names 'original/model.safetensors', which is no safetensors file beside",
        ),
        ({"a": "model-00009.safetensors"}, "names 'model-00009.safetensors', which is no safetensors file beside it"),
        ({"a": "pytorch_model.bin"}, "names 'pytorch_model.bin', which is no safetensors file beside it"),
        ([], "is not a weight index"),
    ],
)
def test_an_index_that_names_other_files_is_refused(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, weight_map: Any, told: str
) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    assert told in refusal(hub, {**DISTRACTIONS, **files, "model.safetensors.index.json": index}, tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model.gguf", "README.md"], "it has no config.json: it holds GGUF files; download one of them and name the"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "no config.json: its weights are in Mistral's or"),
        (
            ["config.json", "consolidated.00.pth", "params.json"],
            "no model.safetensors or model.safetensors.index.json:",
        ),
        (["config.json", "pytorch_model.bin", "tokenizer.json"], "weights in other formats can hold code"),
        (["adapter_config.json", "adapter_model.safetensors"], "it holds an adapter, not a model; merge it"),
        (["model_index.json"], "it holds a pipeline that makes images"),
        (["config.json", "model.fp16.safetensors"], "no model.safetensors or .*, only model.fp16.safetensors; take"),
        (["config.json", "model.safetensors", "tekken.json"], "it has no tokenizer.json, only tekken.json; take"),
        (["README.md"], "it has no config.json; take a repository in the format of transformers"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value),
)
def test_what_holds_no_model_is_refused_by_its_files(
    hub: SmallHub, tmp_path: Path, names: list[str], told: str
) -> None:
    said = refusal(hub, dict.fromkeys(names, b"{}"), tmp_path)
    assert said.startswith("org/model cannot be served: it")
    assert re.search(told, said), said
    assert hub.bodies == [], "nothing at all was fetched"


def test_no_byte_of_weights_is_fetched_of_a_model_that_cannot_be_served(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    config = (CONFIGS / "bert-base-uncased.json").read_bytes()
    said = refusal(hub, {**files, "config.json": config, "model.safetensors": 10**9}, tmp_path)
    assert not any("model.safetensors" in request for request in hub.requests)
    report, folder = inspect(MODEL, None, tmp_path, EngineConfig(""), tmp_path)
    assert said == f"org/model cannot be served: {report.refused}", "a check says the same"
    assert report.refused.startswith("BertForMaskedLM: the model's attention mask is neither causal")
    assert (folder / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    ("report", "refused"),
    [
        (ModelReport(refused="it is a plane"), "org/model cannot be served: it is a plane"),
        (ModelReport(too_large="it is too large"), "org/model cannot be served: it is too large"),
        (ModelReport(no_device="it is for another machine"), None),
    ],
    ids=["refused", "too large", "for another machine"],
)
def test_weights_are_fetched_if_the_check_allows_it(
    hub: SmallHub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    report: ModelReport,
    refused: str | None,
) -> None:
    asked: list[Any] = []

    def check(folder: Path, wanted: EngineConfig, held: int) -> ModelReport:
        asked.append((wanted, held, hub.bodies.count("model.safetensors")))
        return report

    monkeypatch.setattr(sources, "check_model", check)
    hub.repositories["org/model"] = {**files}
    wanted = EngineConfig("", device="cuda:7", dtype="bfloat16")
    with pytest.raises(SourceError) if refused else nullcontext() as caught:
        prepare(MODEL, None, tmp_path, lambda *_: None, wanted)
    assert refused is None or str(caught.value) == refused
    assert asked == [(wanted, len(files["model.safetensors"]), 0)]
    assert hub.bodies.count("model.safetensors") == (refused is None)


def test_a_full_disk_is_refused_before_the_fetch(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/model"] = {**files, "model.safetensors": 3 << 40}
    found = look("org/model", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 39, 1 << 39))  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match=r"^the weights of org/model take 3072.0 GiB, and 512.0 GiB are free on the"):
        found.fetch_weights()
    assert "model.safetensors" not in hub.bodies


def test_a_small_file_that_is_large_is_not_fetched(hub: SmallHub, files: dict[str, bytes], tmp_path: Path) -> None:
    huge = {**files, "tokenizer.json": 20 << 30}
    assert "tokenizer.json of org/model has 20.0 GiB; at most 256.0 MiB are read" in refusal(hub, huge, tmp_path)
    assert hub.bodies == []


def test_a_hub_says_what_it_does_not_have(hub: SmallHub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the hub has no model org/model, or it needs a login"):
        look("org/model", tmp_path)


def test_a_connection_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"^org/model cannot be downloaded from the hub: "):
        look("org/model", tmp_path)


def test_nothing_that_is_fetched_before_the_decision_is_a_weight(files: dict[str, bytes]) -> None:
    names = [*DISTRACTIONS, *files, "model-00001-of-00002.safetensors"]
    small = {name for name in names if any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)}
    assert small == files.keys() - {"model.safetensors"}
