"""models.yaml: what it may say and how it is told that it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.weights.sources import FolderSource
from server.config.errors import ConfigError
from server.config.models_file import ThinkingLevels, load_specs, parse_specs, spec_of_path

FULL = """
models:
  small:
    source: /models/small
    aliases: ["gemini-*", "tiny"]
    dtype: float32
    device: cpu
    max_context: 4096
    kv_memory: 0.85
    kv_dtype: fp8
    max_running: 8
    max_waiting: 0
    max_output_tokens: 512
    request_timeout: 30
    display_name: Small
    description: A small model
    load: request
    temperature: 0.7
    top_p: 0.9
    top_k: 40
    min_p: 0.05
    repetition_penalty: 1.1
    lenient: [generationConfig.speechConfig, tools.googleSearch]
    strict_schemas: true
    thinking_levels: {low: 100, xhigh: -1}
  org/big:8b:
    source: hf:org/big
    max_context: null
"""


def test_reads_every_key_in_file_order() -> None:
    small, big = parse_specs(FULL)
    assert small.aliases == ("gemini-*", "tiny")
    assert (small.max_context, small.kv_memory, small.load, small.top_k) == (4096, 0.85, "request", 40)
    assert (small.kv_dtype, big.kv_dtype) == ("fp8", "auto")
    assert (small.min_p, small.repetition_penalty) == (0.05, 1.1)
    assert small.lenient == ("generationConfig.speechConfig", "tools.googleSearch")
    assert (small.strict_schemas, big.strict_schemas) == (True, False)
    assert small.thinking_levels == ThinkingLevels(512, 100, 4096, 16384, -1)
    assert big.thinking_levels == ThinkingLevels()
    assert (big.name, big.max_context, big.load, big.max_waiting) == ("org/big:8b", None, "start", 256)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "{source: x, max_contxt: 1}",
            "'max_contxt' is unknown (did you mean max_context?); the known ones are source, sha256, aliases",
        ),
        ("{source: x, max_context: 0}", "max_context is 0, but must be a whole number of at least 1"),
        ("{source: x, max_context: true}", "max_context is True"),
        ("{source: x, max_waiting: null}", "max_waiting is None"),
        ("{source: x, temperature: .nan}", "a number from 0 to 2"),
        ("{source: x, temperature: 2.1}", "temperature is 2.1, but must be a number from 0 to 2"),
        ("{source: x, top_p: -1}", "top_p is -1, but must be a number from 0 to 1"),
        ("{source: x, top_k: -1}", "top_k is -1, but must be a whole number of at least 0"),
        ("{source: x, top_k: 1.5}", "top_k is 1.5, but must be a whole number of at least 0"),
        ("{source: x, min_p: 1.1}", "min_p is 1.1, but must be a number from 0 to 1"),
        ("{source: x, repetition_penalty: 0}", "repetition_penalty is 0, but must be a number above 0"),
        ("{source: x, presence_penalty: 1}", "'presence_penalty' is unknown"),
        ("{source: x, request_timeout: 0}", "seconds, above 0 and at most 86400"),
        ("{source: x, kv_memory: .inf}", "a share of the free GPU memory"),
        ("{source: x, kv_memory: 0}", "a share of the free GPU memory"),
        ("{source: x, kv_dtype: int8}", "kv_dtype is 'int8', but must be one of auto, fp8"),
        ("{source: x, dtype: int8}", "one of auto, float32"),
        ("{source: x, load: never}", "start or request"),
        ("{source: x, sha256: abc}", "64 hex digits"),
        ("{source: x, aliases: gemini}", "a list of names"),
        ("{source: x, aliases: ['a b']}", "a list of names"),
        ("{source: x, lenient: generationConfig.seed}", "a list of fields by their JSON path"),
        ("{source: x, lenient: [7]}", "a list of fields by their JSON path"),
        ("{source: x, strict_schemas: 1}", "strict_schemas is 1, but must be true or false"),
        (
            "{source: x, thinking_levels: {low: 1, most: 2}}",
            "a mapping of minimal, low, medium, high, xhigh to numbers",
        ),
        ("{source: x, thinking_levels: {low: -2}}", "-1 for no limit"),
        ("{source: x, thinking_levels: 100}", "thinking_levels is 100"),
        ("{source: 7}", "source is 7"),
        ("{load: start}", "'source' is missing"),
        ("{source: 'pypi:a==1/b.gguf'}", "needs the key 'sha256'"),
        ("[source]", "must be a mapping"),
        ("{source: x, source: y}", "the key 'source' is given twice"),
        (f"{{source: 'hf:org/x', sha256: '{0:064}'}}", "sha256 belongs to a GGUF file"),
        ("{source: x, quantize: q5}", "quantize is 'q5', but must be one of none, q8, q4, fp8"),
        ("{source: x.gguf, quantize: q8}", "quantize packs safetensors; a GGUF file is quantised already, remove it"),
        ("{source: 'https://x'}", "the source 'https://x' is none of"),
        ("{source: x, ? [1] : 2}", "not valid YAML"),
        ("{source: x", "not valid YAML: line 3"),
    ],
)
def test_refusals_name_entry_key_value_and_limit(entry: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as refused:
        parse_specs(f"models:\n  m: {entry}\n")
    assert expected in str(refused.value)


@pytest.mark.parametrize("name", ["a b", "../x", "a..b", "-x", "7", "x?y"])
def test_refused_names(name: str) -> None:
    with pytest.raises(ConfigError, match="a name must be"):
        parse_specs(f"models:\n  {name}: {{source: x}}\n")


@pytest.mark.parametrize(
    "text", ["", "models:", "models: {}", "models: [a]", "modles: {}", "- a", "{models: {}, x: 1}"]
)
def test_a_file_without_models_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_specs(text)


@pytest.mark.parametrize(
    ("first", "second"), [("[b]", "[]"), ("[x]", "[x]"), ("['g-*']", "['g-*']"), ("[x, x]", "[]"), ("[a]", "[]")]
)
def test_an_alias_means_one_model(first: str, second: str) -> None:
    text = f"models: {{a: {{source: x, aliases: {first}}}, b: {{source: y, aliases: {second}}}}}"
    with pytest.raises(ConfigError, match="already means"):
        parse_specs(text)


def test_relative_sources_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: {m: {source: weights/m}}")
    (spec,) = load_specs(tmp_path / "models.yaml")
    assert spec.where() == FolderSource(tmp_path / "weights/m")


def test_load_specs_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_specs(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("SmolLM2 135M.Q4_1.gguf", "SmolLM2-135M.Q4_1"), ("Qwen3-8B", "Qwen3-8B"), ("..a..b", "a.b"), ("(…)", "model")],
)
def test_a_path_is_served_under_its_own_name(tmp_path: Path, file_name: str, name: str) -> None:
    (tmp_path / file_name).mkdir()
    spec = spec_of_path(tmp_path / file_name)
    assert (spec.name, spec.aliases, spec.source) == (name, ("gemini-*",), str(tmp_path / file_name))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        spec_of_path(tmp_path / "nothing")
