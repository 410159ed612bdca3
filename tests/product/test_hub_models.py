"""A model of a hub from the first look to its weights, as processes: nothing is patched but the address of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_hub import running_hub
from support.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
TEMPLATES = ROOT / "tests" / "data" / "chat_templates"

pytestmark = pytest.mark.product


def castor(*args: str, cache: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    line = [sys.executable, "-m", "server.cli", *args, "--cache-dir", str(cache)]
    environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ
    return subprocess.run(
        line, capture_output=True, text=True, timeout=240, check=False, env=environment, stdin=subprocess.DEVNULL
    )


def test_a_new_user_checks_then_fetches_from_a_hub(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", "qwen3")
    shutil.copy(TEMPLATES / "Qwen3-0.6B.jinja", model / "chat_template.jinja")
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    files: dict[str, bytes | int] = {path.name: path.read_bytes() for path in model.iterdir()}
    bert = {**files, "config.json": (CONFIGS / "bert-base-uncased.json").read_bytes(), "model.safetensors": 10**9}
    cache = tmp_path / "cache"
    (tmp_path / "models.yaml").write_text("models: {bad: {source: 'hf:org/bert'}, good: {source: 'hf:org/qwen'}}")
    with running_hub() as hub:
        hub.repositories |= {"org/qwen": {**files, "original/model.safetensors": b"again"}, "org/bert": bert}
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = castor("check", "hf:org/qwen", "--context", "100", cache=cache, **environ)
        assert done.returncode == 0, done.stderr
        rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
        rows = {name.strip(): text.strip() for name, text in rows.items()}
        assert rows["class"] == "Qwen3ForCausalLM (qwen3)"
        assert rows["layers"] == "2 with full attention"
        assert rows["keys and values"] == (
            "512 bytes a token in float32; 56.0 KiB for a context of 100 tokens, in blocks of 16"
        )
        assert rows["longest context"].startswith("512 tokens")
        assert (rows["family"], rows["tools"]) == ("hermes", "in the template")
        assert rows["thinking"] == "yes, switched by enable_thinking"
        assert rows["sampling"] == "temperature 0.6, top_p 1, top_k 20, min_p 0, repetition_penalty 1"
        assert done.stdout.splitlines()[-1] == "hf:org/qwen can be served"
        assert "Fetching" not in done.stderr
        fetch = ("models", "fetch", "--models", str(tmp_path / "models.yaml"))
        refused = castor(*fetch, "bad", cache=cache, **environ)
        assert refused.returncode == 1
        (said,) = [line for line in refused.stderr.splitlines() if line.startswith("castor: ")]
        assert said.startswith("castor: org/bert cannot be served: BertForMaskedLM: the model's attention mask is")
        assert "model.safetensors" not in hub.bodies
        listed = str(tmp_path / "models.yaml")
        served = castor("serve", "--fetch", "--port", "0", "--models", listed, cache=cache, **environ)
        assert served.returncode == 1
        assert said in served.stderr.splitlines(), "serve says the same"
        fetched = castor(*fetch, "good", cache=cache, **environ)
        assert fetched.returncode == 0, fetched.stderr
        assert hub.bodies.count("model.safetensors") == 1
        assert "original/model.safetensors" not in hub.bodies
    checked = castor("check", "hf:org/qwen", "--json", cache=cache, HF_ENDPOINT="http://127.0.0.1:9")
    found = json.loads(checked.stdout)
    assert (found["servable"], found["parameters"], found["family"]) == (True, 102_784, "hermes")
    assert found["sampling"]["temperature"] == 0.6
