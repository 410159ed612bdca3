"""``castor check`` as a user meets it: what it says of models that are here, and of others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import write_tiny_gguf
from support.tiny import save_tiny_tokenizer

from engine.api.model_report import ModelReport
from server.commands import check as command
from server.commands.check import check_source
from server.config.settings import Settings

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "data" / "configs"


def castor(*args: str, cache: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    line = [sys.executable, "-m", "server.cli", *args, "--cache-dir", str(cache)]
    environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        line, capture_output=True, text=True, timeout=240, check=False, env=environment, stdin=subprocess.DEVNULL
    )


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    shutil.copy(CONFIGS / "whisper-tiny.json", tmp_path / "config.json")
    done = castor("check", str(tmp_path), cache=tmp_path / "cache")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "class            WhisperForConditionalGeneration (whisper)",
        "input            text",
        f"{tmp_path} cannot be served: whisper is an encoder-decoder; only decoder models are served",
    ]


@pytest.mark.parametrize("args", [["--json"], ["--context", "5"], ["--device", "cpu"], ["--dtype", "float32"]])
def test_options_of_a_source_need_one(args: list[str], tmp_path: Path) -> None:
    done = castor("check", *args, cache=tmp_path)
    assert done.returncode == 2
    assert "need a SOURCE" in done.stderr


FULL = ModelReport(
    class_name="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    parameters=4_300_079_472,
    active_parameters=1_000_000,
    layers=(("sliding window of 1024", 29), ("full attention", 5)),
    inputs=("text", "image"),
    weights_dtype="bfloat16",
    weights_bytes=8 << 30,
    kv_dtype="bfloat16",
    kv_bytes_per_token=1 << 17,
    block_size=16,
    context=8192,
    context_bytes=1 << 30,
    longest_context=131_072,
    context_limit="",
    cache_tokens=4096,
    device="cuda:0 (a card)",
    device_bytes=80 << 30,
    free_bytes=79 << 30,
    weights_by_choice=(("none", 16 << 30), ("q8", 4 << 30)),
    native=False,
    not_native="it computes on a card",
)


def shown(
    report: ModelReport,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **options: Any,
) -> tuple[int, str]:
    """The exit code and what is printed of a report on a folder."""
    monkeypatch.setattr(command, "inspect", lambda *_: (report, folder))
    given = {"context": None, "device": None, "dtype": None, "as_json": False, **options}
    code = check_source(Settings.from_env({}), str(folder), **given)
    return code, capsys.readouterr().out


def test_everything_that_is_known_has_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shown(FULL, tmp_path, monkeypatch, capsys)
    assert code == 0
    assert text.splitlines() == [
        "class            Gemma3ForConditionalGeneration (gemma3)",
        "parameters       4,300,079,472, 1,000,000 of them for each token",
        "layers           29 with sliding window of 1024, 5 with full attention",
        "input            text; image: not served yet",
        "weights          8.0 GiB in bfloat16",
        "quantize         none: 16.0 GiB, q8: 4.0 GiB",
        "keys and values  128.0 KiB a token in bfloat16; 1.0 GiB for a context of 8,192 tokens, in blocks of 16",
        "longest context  131,072 tokens: what the model was made for",
        "device           cuda:0 (a card), 80.0 GiB, of which 79.0 GiB are free",
        "room             about 4,096 tokens beside the weights now; the context is shortened to that, raise kv_memory "
        "for more",
        "computed         by torch: it computes on a card",
        "sampling         temperature 1, top_p 1, top_k 0, min_p 0, repetition_penalty 1",
        f"{tmp_path} can be served once it has *.safetensors and tokenizer.json",
    ]


def test_a_device_that_is_full_now_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = shown(replace(FULL, cache_tokens=0), tmp_path, monkeypatch, capsys)
    assert "\nroom             none beside the weights now: end what else uses the device\n" in text


@pytest.mark.parametrize("problem", ["refused", "too_large", "no_device"])
def test_each_problem_is_the_last_line_and_the_exit_status(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = shown(ModelReport(**{problem: "it is a plane"}), tmp_path, monkeypatch, capsys)  # type: ignore[arg-type]
    assert code == 1
    assert text.splitlines()[-1] == f"{tmp_path} cannot be served: it is a plane"
    code, text = shown(ModelReport(**{problem: "it is a plane"}), tmp_path, monkeypatch, capsys, as_json=True)  # type: ignore[arg-type]
    found = json.loads(text)
    assert (code, found["servable"], found["problem"], found[problem]) == (1, False, "it is a plane", "it is a plane")


def test_a_template_of_no_known_family_and_none_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_tokenizer(tmp_path)
    _, text = shown(FULL, tmp_path, monkeypatch, capsys)
    assert "family           castor (the fallback: the template is of no known family)" in text
    assert "tools            by Castor's own prompt" in text
    assert "thinking         no" in text
    (tmp_path / "chat_template.jinja").unlink()
    _, text = shown(FULL, tmp_path, monkeypatch, capsys)
    assert "template         none: prompts are the plain texts of a conversation" in text
    (tmp_path / "tokenizer.json").write_text("{}")
    _, text = shown(FULL, tmp_path, monkeypatch, capsys)
    assert "template         cannot be read: " in text


def test_an_entry_is_checked_as_it_would_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def inspect(source: Any, sha256: Any, cache: Path, wanted: Any, details: Path) -> Any:
        asked.append((source.path, sha256, wanted.device, wanted.dtype, wanted.max_context))
        return ModelReport(), details

    monkeypatch.setattr(command, "inspect", inspect)
    path = tmp_path / "models.yaml"
    path.write_text("models: {mine: {source: a.gguf, sha256: '" + "1" * 64 + "', device: 'cuda:1', dtype: float16}}")
    settings = Settings.from_env({}, models=path)
    for options in ({}, {"device": "cpu", "dtype": "float32", "context": 100}):
        given = {"context": None, "device": None, "dtype": None, "as_json": False, **options}
        assert check_source(settings, "mine", **given) == 0
    assert asked == [
        (tmp_path / "a.gguf", "1" * 64, "cuda:1", "float16", None),
        (tmp_path / "a.gguf", "1" * 64, "cpu", "float32", 100),
    ]


def test_a_gguf_file_tells_of_its_template_and_sampling(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": "{{ messages }}", "general.sampling.temp": 0.25}
    write_tiny_gguf(tmp_path / "a.gguf", metadata=metadata)
    found = json.loads(castor("check", str(tmp_path / "a.gguf"), "--json", cache=tmp_path / "cache").stdout)
    assert (found["servable"], found["class_name"], found["weights_dtype"]) == (True, "LlamaForCausalLM", "float32")
    assert (found["template"], found["family"], found["sampling"]["temperature"]) == (True, "castor", 0.25)
    assert not (tmp_path / "cache" / "models").exists(), "nothing was converted"


def test_what_is_no_source_is_one_sentence(tmp_path: Path) -> None:
    done = castor("check", str(tmp_path / "nowhere"), cache=tmp_path / "cache")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("there is nothing at that path; name a model folder or a .gguf file")
