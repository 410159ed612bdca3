"""The files of golden transcripts: cases as `support.golden` plays them, and the answers that they keep."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

Case = dict[str, Any]
Answer = dict[str, Any]

FOLDER = Path(__file__).parents[1] / "data" / "golden"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such; nothing is folded, and nothing refers to another place."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text_node)


def dumped(value: Any) -> str:
    """``value`` as YAML in the order that it has."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30)
    return text


def files() -> list[Path]:
    """The files of cases, those of the command included."""
    return sorted(FOLDER.glob("*.yaml"))


@lru_cache(maxsize=64)
def load(path: Path) -> dict[str, Any]:
    """One file, read once: it is for reading only."""
    document: dict[str, Any] = yaml.load(path.read_text("utf-8"), yaml.CSafeLoader)
    return document


def names() -> list[str]:
    """Every case, as the name of its file and its own."""
    return [f"{path.stem}/{case['case']}" for path in files() for case in load(path)["cases"]]


def find(name: str) -> tuple[dict[str, Any], Case]:
    """The file of a case, and the case."""
    stem, _, wanted = name.partition("/")
    document = load(FOLDER / f"{stem}.yaml")
    (case,) = [case for case in document["cases"] if case["case"] == wanted]
    return document, case


def kept(case: Case) -> list[Answer]:
    """The answers of a case as its file has them."""
    return [step.get("answer", {}) for step in case["steps"]]


def same(some: list[Answer], others: list[Answer]) -> bool:
    """Whether answers are equal, the order of keys included."""
    return json.dumps(some) == json.dumps(others)
