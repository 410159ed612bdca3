"""Measures the structure of the code from its syntax.

The code is the Python packages ``server``, ``engine``, ``benchmarks`` and those in ``scripts/``, without the tests.
Functions are all ``def`` and ``async def``, nested ones included. A module is a file with more than a docstring.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import resolve_name
from pathlib import Path
from typing import TypeVar

PACKAGES = ("server", "engine", "benchmarks")
_NAMING = ("id", "attr", "arg", "name", "asname", "value")  # the last one is that of constants
Key = TypeVar("Key")
ClassKey = tuple[str, str]  # module and qualified name
Families = Mapping[ClassKey, set[ClassKey]]
Aliases = Mapping[str, tuple[str, str]]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One file. ``name`` is its import name, ``path`` is relative to the root, ``package`` is the top folder."""

    name: str
    path: Path
    package: str
    tree: ast.Module


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """``name`` includes the classes and functions around it; ``owner`` is the class of a method, else empty."""

    module: Module
    name: str
    owner: str
    nested: bool
    node: FunctionNode


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A name that is read. ``base`` is what comes before the dot: None for a bare name, "" for an expression.

    ``around`` are the functions that contain it, outermost first. ``called`` says that it is called in place, and
    ``awaited`` that the result is awaited in place.
    """

    module: Module
    name: str
    base: str | None
    owner: str
    around: tuple[Function, ...]
    called: bool
    awaited: bool


@dataclass(frozen=True, slots=True)
class Helper:
    """A private function with one reference. ``is_value``: it is passed as a value (callback, key, task), not
    called."""

    function: Function
    caller: str
    is_value: bool


@dataclass(slots=True)
class Code:
    """The syntax of all modules, by name, and what they contain. Classes are keyed by module and qualified name."""

    modules: dict[str, Module] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    classes: dict[ClassKey, tuple[Module, ast.ClassDef]] = field(default_factory=dict)
    references: dict[str, list[Reference]] = field(default_factory=lambda: defaultdict(list))


def read_code(root: Path) -> Code:
    """Parse the packages below ``root``; those that are missing are left out."""
    code = Code()
    scripts = sorted(path.parent for path in (root / "scripts").glob("*/__init__.py"))
    for folder in (*(root / name for name in PACKAGES), *scripts):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text("utf-8"))
            module = Module(name, path.relative_to(root), str(folder.relative_to(root)), tree)
            code.modules[name] = module
            _Reader(code, module).visit(tree)
    return code


class _Reader(ast.NodeVisitor):
    """Collects the functions, classes and references of one module."""

    def __init__(self, code: Code, module: Module) -> None:
        self._code, self._module = code, module
        self._parents = {child: node for node in ast.walk(module.tree) for child in ast.iter_child_nodes(node)}
        self._names: tuple[str, ...] = ()
        self._owner = ""
        self._around: tuple[Function, ...] = ()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        names, owner = self._names, self._owner
        self._names = (*names, node.name)
        self._owner = ".".join(self._names)
        self._code.classes[self._module.name, self._owner] = self._module, node
        self.generic_visit(node)
        self._names, self._owner = names, owner

    def visit_FunctionDef(self, node: FunctionNode) -> None:
        names, around = self._names, self._around
        parent = self._parents[node]
        while isinstance(parent, ast.If | ast.Try | ast.With):
            parent = self._parents[parent]
        owner = self._owner if isinstance(parent, ast.ClassDef) else ""
        self._names = (*names, node.name)
        nested = not isinstance(parent, ast.Module | ast.ClassDef)
        function = Function(self._module, ".".join(self._names), owner, nested, node)
        self._code.functions.append(function)
        self._around = (*around, function)
        self.generic_visit(node)
        self._names, self._around = names, around

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        self._refer(node, node.id, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._refer(node, node.attr, node.value.id if isinstance(node.value, ast.Name) else "")
        self.generic_visit(node)

    def _refer(self, node: ast.Name | ast.Attribute, name: str, base: str | None) -> None:
        if isinstance(node.ctx, ast.Load):
            call = self._parents[node]
            called = isinstance(call, ast.Call) and call.func is node
            awaited = called and isinstance(self._parents[call], ast.Await)
            use = Reference(self._module, name, base, self._owner, self._around, called, awaited)
            self._code.references[name].append(use)


def length(node: ast.stmt) -> int:
    """Lines from ``def`` or ``class`` to the end, decorators not counted."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def folders(code: Code) -> dict[Path, tuple[int, int]]:
    """For each folder: the number of modules, and of files including those with only a docstring."""
    files = Counter(module.path.parent for module in code.modules.values())
    trees = ((module.path.parent, module.tree) for module in code.modules.values())
    full = Counter(folder for folder, tree in trees if len(tree.body) > (ast.get_docstring(tree) is not None))
    return {folder: (full[folder], files[folder]) for folder in sorted(files)}


def helpers(code: Code) -> list[Helper]:
    """Private functions and methods with exactly one reference outside their own definition, by file and line.

    Left out are nested and decorated functions, and methods that a base or a derived class has too: these do not exist
    for their size. An ``async def`` that is not awaited where it is called becomes a task: it counts as passed as a
    value.
    """
    aliases = {name: _aliases(module) for name, module in code.modules.items()}
    families = _families(code, aliases)
    private: dict[str, list[Function]] = defaultdict(list)
    for function in code.functions:
        name = function.node.name
        if name.startswith("_") and not name.startswith("__") and not function.nested:
            private[name].append(function)
    found = []
    for name, functions in private.items():
        uses: dict[Function, list[Reference]] = defaultdict(list)
        for reference in code.references[name]:
            for function in _targets(reference, functions, families, aliases[reference.module.name]):
                if function not in reference.around:
                    uses[function].append(reference)
        for function in functions:
            key = function.module.name, function.owner
            relatives = [f for f in functions if f.owner and (f.module.name, f.owner) in families.get(key, ())]
            if function.node.decorator_list or len(relatives) > 1 or len(uses[function]) != 1:
                continue
            (use,) = uses[function]
            yields = any(isinstance(node, ast.Yield) for node in ast.walk(function.node))
            is_task = isinstance(function.node, ast.AsyncFunctionDef) and not use.awaited and not yields
            where = use.around[-1].name if use.around else "<module>"
            caller = where if use.module is function.module else f"{use.module.name}:{where}"
            found.append(Helper(function, caller, not use.called or is_task))
    return sorted(found, key=lambda helper: (helper.function.module.path, helper.function.node.lineno))


def _targets(use: Reference, functions: Sequence[Function], families: Families, aliases: Aliases) -> list[Function]:
    """The functions that a reference may mean, among those of its name."""
    here = use.module.name
    if use.base is None:
        module, name = aliases.get(use.name, (here, use.name))
        in_body = "" if use.around else use.owner
        named = [f for f in functions if f.module.name == module and f.node.name == name]
        return [f for f in named if f.owner == in_body] or [f for f in named if not f.owner]
    if use.base in ("self", "cls") and use.owner:
        return [f for f in functions if f.owner and (f.module.name, f.owner) in families[here, use.owner]]
    if use.base in aliases:
        imported = ".".join(filter(None, aliases[use.base]))
        if plain := [f for f in functions if not f.owner and f.module.name == imported]:
            return plain
    methods = [f for f in functions if f.owner]
    return [f for f in methods if f.module is use.module] or methods


def _aliases(module: Module) -> Aliases:
    """What each imported name means: a module and, of ``from`` imports, the name in it."""
    known: dict[str, tuple[str, str]] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or a.name.partition(".")[0]: (a.name, "") for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: (_base(module, node), a.name) for a in node.names}
    return known


def _families(code: Code, aliases: Mapping[str, Aliases]) -> Families:
    """For each class: itself, its bases and what derives from it, as far as they are in the code."""
    above: dict[ClassKey, set[ClassKey]] = {key: set() for key in code.classes}
    for (name, owner), (_, node) in code.classes.items():
        for base in node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                above[name, owner] |= {aliases[name].get(plain.id, (name, plain.id))} & above.keys()
    reach = reachable(above)
    return {one: {one} | reach[one] | {other for other in reach if one in reach[other]} for one in reach}


def imports(code: Code) -> Iterator[tuple[str, str, bool]]:
    """Importing module, imported module, and whether one loads the other: not inside functions, not for type checks."""
    for module in code.modules.values():
        late: set[ast.AST] = set()
        for node in ast.walk(module.tree):
            is_check = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if is_check or isinstance(node, FunctionNode):
                late.update(ast.walk(node))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _base(module, node)
                names = [n if (n := f"{base}.{alias.name}") in code.modules else base for alias in node.names]
            else:
                continue
            yield from ((module.name, name, node not in late) for name in names if name in code.modules)


def _base(module: Module, node: ast.ImportFrom) -> str:
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


def cycles(edges: Iterator[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one, other in edges:
        if one != other:
            graph[one].add(other)
    reach = reachable(graph)
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def reachable(graph: Mapping[Key, set[Key]]) -> dict[Key, set[Key]]:
    """The keys reachable from each key, in one step or more."""
    reach: dict[Key, set[Key]] = {}
    for start in graph:
        seen: set[Key] = set()
        waiting = list(graph[start])
        while waiting:
            key = waiting.pop()
            if key not in seen:
                seen.add(key)
                waiting += graph.get(key, ())
        reach[start] = seen
    return reach


def naming(code: Code, word: str) -> list[Path]:
    """Files with this snake_case word, or its camelCase form, in an identifier or a string that is no docstring."""
    head, *rest = word.split("_")
    camel = head + "".join(part.capitalize() for part in rest)
    pattern = re.compile(rf"(?<![a-zA-Z0-9])({word}|{word.upper()}|{camel})(?![a-zA-Z0-9])")
    found = []
    for module in code.modules.values():
        nodes = list(ast.walk(module.tree))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        values = (getattr(node, name, None) for node in nodes if node not in docstrings for name in _NAMING)
        if any(isinstance(value, str) and pattern.search(value) for value in values):
            found.append(module.path)
    return found
