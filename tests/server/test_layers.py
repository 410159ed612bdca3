"""The order of the server's folders: each imports only what stands below it, and little of the engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = (
    ("cli",),
    ("commands",),
    ("app", "bench"),
    ("routes",),
    ("services",),
    ("generation", "http"),
    ("models", "grammar", "mapper"),
    ("convert",),
    ("media",),
    ("wire", "storage"),
    ("families", "observability", "offload"),
    ("errors",),
    ("config", "version"),
)
"""From the top to the ground; neighbours in a line do not import each other."""

OF_THE_ENGINE = ("engine.api", "engine.process.client", "engine.weights.sources")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in (ROOT / "server").rglob("*.py")
}


def imports(tree: ast.Module) -> Iterator[str]:
    """The modules that are imported anywhere in a module, late and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(module: str) -> int:
    """How far a module stands from the top."""
    part = module.split(".")[1]
    return next(place for place, parts in enumerate(LAYERS) if part in parts)


def test_every_module_has_its_layer() -> None:
    parts = {name.split(".")[1] for name in MODULES if name != "server"}
    assert parts == {part for parts in LAYERS for part in parts}


def test_imports_go_down() -> None:
    found = {
        (name, other)
        for name, tree in MODULES.items()
        for other in imports(tree)
        if other.startswith("server.") and name.split(".")[1:2] != other.split(".")[1:2] and name != "server"
        if layer(other) <= layer(name)
    }
    assert found == set()


def test_little_of_the_engine_is_imported() -> None:
    found = {(name, other) for name, tree in MODULES.items() for other in imports(tree) if other.startswith("engine")}
    assert {pair for pair in found if not pair[1].startswith(OF_THE_ENGINE)} == set()
    assert len(found) > 20


def test_only_the_surface_speaks_http() -> None:
    of_http = ("starlette", "uvicorn")
    users = {
        name.split(".")[1] for name, tree in MODULES.items() for other in imports(tree) if other.startswith(of_http)
    }
    assert users <= {"app", "services", "routes", "http"}
