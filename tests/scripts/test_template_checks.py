"""``scripts/check_templates``: what it says of the templates of the tests, and of such that lack something."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from support.templates import FOLDER, template
from template_checks import check

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


def script() -> Any:
    """The script as a module."""
    spec = spec_from_loader("check_templates", SourceFileLoader("check_templates", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
async def test_the_templates_of_the_tests_lack_nothing(name: str, tmp_path: Path) -> None:
    report = await check(template(name), tmp_path / "model")
    assert report.problems == ()
    assert report.family.is_known == (name != "Phi-3.5")


@pytest.mark.parametrize(
    ("fails", "old", "new"),
    [
        ("render", "'<|im_start|>user\\n' + message.content", "'<|im_start|>user\\n' + message.content[:1]"),
        ("functions", "(tool | tojson)", "tool.function.name"),
        ("calls", "(call.function.arguments | tojson)", "'{}'"),
        ("results", "<tool_response>\\n' + message.content", "<tool_response>\\n' + message.content.replace('3', '4')"),
        ("thoughts", "'\\n</think>\\n\\n' }}{%- endif %}\n{{- message", "'\\n</thought>' }}{%- endif %}\n{{- message"),
        ("switch", "'<think>\\n\\n</think>\\n\\n'", "'<think>\\n'"),
    ],
)
async def test_what_a_template_lacks_is_named(fails: str, old: str, new: str, tmp_path: Path) -> None:
    whole = template("Qwen3-0.6B")
    assert old in whole
    report = await check(whole.replace(old, new), tmp_path / "model")
    assert fails in [problem.partition(":")[0] for problem in report.problems]


async def test_a_template_that_refuses_is_a_problem_with_its_words(tmp_path: Path) -> None:
    report = await check("{{ raise_exception('not today') }}", tmp_path / "model")
    assert str(report).startswith("castor (fallback), functions by Castor's prompt: render: ")
    assert "not today" in str(report)


async def test_a_line_for_each_template_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jinja").write_text(template("Phi-3.5"))
    (tmp_path / "a.jinja").write_text(template("Seed-OSS"))
    check_folder = script().main
    assert await check_folder(tmp_path) == 0
    lines = [
        "a.jinja: seed-oss, thinks (thinking_budget): ok",
        "b.jinja: castor (fallback), functions by Castor's prompt: ok",
    ]
    assert capsys.readouterr().out.splitlines() == lines
    (tmp_path / "c.jinja").write_text("{{ raise_exception('not today') }}")
    assert await check_folder(tmp_path) == 1


async def test_a_folder_without_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await script().main(tmp_path) == 2
    assert "holds no *.jinja" in capsys.readouterr().err
