"""The shape of the repository: what the scripts and the design rely on."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from server.config.models_file import load_specs

ROOT = Path(__file__).parents[2]
FILES = [
    *(path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix != ".py"),
    ROOT / ".ci" / "run",
]
SCRIPTS = [path for path in FILES if "python" not in path.read_text("utf-8").partition("\n")[0]]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_read_by_its_shell(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False, timeout=30).returncode == 0
    assert path.suffix == ".sh" or os.access(path, os.X_OK), "it is run by its name"


def test_the_builtin_model_stands_in_for_cloud_models() -> None:
    (builtin,) = load_specs(ROOT / "models.yaml")
    assert builtin.name == "smollm2-135m-instruct"
    assert builtin.aliases == ("gemini-*",)
    thinking = "generationConfig.thinkingConfig"
    assert builtin.lenient == (f"{thinking}.thinkingBudget", f"{thinking}.thinkingLevel")
    assert (builtin.load, builtin.max_output_tokens) == ("start", 2048)


def test_the_example_in_models_yaml_is_a_valid_entry(tmp_path: Path) -> None:
    text = (ROOT / "models.yaml").read_text("utf-8")
    lines = text[text.index("  # team-model:") :].splitlines()
    example = "models:\n" + "\n".join(line.replace("# ", "", 1) for line in lines)
    assert set(yaml.safe_load(example)["models"]) == {"team-model"}
    (tmp_path / "models.yaml").write_text(example)
    (entry,) = load_specs(tmp_path / "models.yaml")
    assert entry.kv_memory == 0.92


def test_every_pin_is_exact_and_torch_is_the_plain_release() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert "transformers==5.23.0" in pins
    assert all("==" in pin and "+" not in pin and "@" not in pin for pin in pins)


def test_the_architecture_page_names_every_folder_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("- `")}
    folders = {path.parent for package in ("server", "engine") for path in (ROOT / package).rglob("*.py")}
    assert listed == {f"{path.relative_to(ROOT)}/" for path in folders}


def test_what_is_installed_imports_nothing_of_the_checkout() -> None:
    modules = [path for package in ("server", "engine") for path in (ROOT / package).rglob("*.py")]
    found = {}
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.partition(".")[0] for name in names} & {"benchmarks", "scripts", "tests", "gpu_checks"}:
                found[str(path.relative_to(ROOT))] = names
    assert len(modules) > 20
    assert found == {}


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by it. Those of ``tests/interpreted`` run in processes of their own."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "interpreted"]
    assert sorted(names) == sorted(set(names))
