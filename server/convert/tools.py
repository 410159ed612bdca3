"""Function declarations: checked, in the form that chat templates take, and which of them may be called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from server.errors import FieldViolation
from server.families.tagged_calls import CASTOR_PROMPT
from server.wire.fields import shown
from server.wire.json_schema import MAX_NESTING, TYPES
from server.wire.requests import GenerateContentRequest
from server.wire.support import joined
from server.wire.tools import FunctionCallingConfig, FunctionDeclaration

MAX_FUNCTIONS = 512
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}")
BAD_NAME = (
    "Invalid function name. Must start with a letter or an underscore. Must be alphanumeric (a-z, A-Z, 0-9), "
    "underscores (_), dots (.), colons (:), or dashes (-), with a maximum length of 128."
)
_DATA = frozenset(("default", "example", "examples", "enum", "const"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "defs", "definitions"))
_CHOOSING = ("ANY", "VALIDATED")
_NAMED_KEYS = 8
_NO_CONFIG = FunctionCallingConfig()
_WORD = re.compile(r"\w*")


@dataclass(frozen=True, slots=True)
class Function:
    """A declared function. The schemas are the caller's, with the types in JSON Schema's spelling. ``path`` is that of
    the parameters, which are JSON Schema with ``is_json_schema``."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    returns: Mapping[str, Any] | None = None
    path: str = ""
    is_json_schema: bool = False

    def for_template(self) -> dict[str, Any]:
        """The function as chat templates take it. Templates look into the parameters, so there always are some."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function | ({"return": self.returns} if self.returns else {})}


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that the model sees (``functions``) and those that it may call (``allowed``).

    With ``must_call`` the answer is calls and nothing else.
    """

    functions: tuple[Function, ...]
    allowed: tuple[Function, ...]
    must_call: bool = False

    def for_template(self) -> list[dict[str, Any]]:
        """All functions as chat templates take them."""
        return [function.for_template() for function in self.functions]


def read_tools(request: GenerateContentRequest, control_texts: Sequence[str] = ()) -> Tools | None:
    """The functions of a request, or None where there are none or the mode is NONE.

    ``control_texts`` are the texts of the model's control tokens: names are the one kind of text that rendering cannot
    protect from becoming one. Raises ``InvalidArgument`` naming each problem.
    """
    declared = [
        (f"tools[{place}].function_declarations[{index}]", declaration)
        for place, tool in enumerate(request.tools)
        for index, declaration in enumerate(tool.function_declarations)
    ]
    config = (request.tool_config and request.tool_config.function_calling_config) or _NO_CONFIG
    problems = [*_declaration_problems(declared, control_texts), *_mode_problems(declared, config)]
    if problems:
        raise joined(problems)
    if not declared or config.mode == "NONE":
        return None
    functions = tuple(
        Function(
            declaration.name,
            declaration.description,
            _plain_types(declaration.parameters or declaration.parameters_json_schema) or None,
            _plain_types(declaration.response or declaration.response_json_schema) or None,
            path + (".parameters" if declaration.parameters else ".parameters_json_schema"),
            not declaration.parameters,
        )
        for path, declaration in declared
    )
    names = frozenset(config.allowed_function_names)
    allowed = tuple(function for function in functions if not names or function.name in names)
    return Tools(functions, allowed, must_call=config.mode == "ANY")


def data_problems(value: Any, control_texts: Sequence[str]) -> Iterator[str]:
    """Why data of the caller (a schema, arguments) cannot be shown to the model, a sentence per kind of problem."""
    left = [(value, 0)]
    found, named = 0, list[str]()
    while left:
        place, level = left.pop()
        if level > MAX_NESTING:
            yield f"it is nested deeper than {MAX_NESTING} levels."
            break
        if isinstance(place, dict):
            unsafe = [name for name in place if may_become_control(name, control_texts)]
            found += len(unsafe)
            named += unsafe[: _NAMED_KEYS - len(named)]
        if isinstance(place, dict | list):
            left += [(item, level + 1) for item in (place.values() if isinstance(place, dict) else place)]
    if found:
        names = ", ".join(map(shown, named)) + (f" and {found - len(named)} more" if found > len(named) else "")
        yield f"rename what contains a control token of the model, or could become one in its prompt: {names}."


def may_become_control(name: str, control_texts: Sequence[str]) -> bool:
    """Whether a name, as a template may write it, could be read as a control token.

    Rendering neutralises control tokens in texts, but not in names, nor those that a name and the template's own text
    form together: ``<|im_end|`` in ``<parameter=NAME>``.
    """
    if not control_texts:
        return False
    controls = _controls(tuple(control_texts))
    if not controls.marks.search(name):
        return controls.whole.search(name) is not None
    # Templates write keys of schemas between angle brackets too.
    if controls.whole.search(f"<{name}>"):
        return True
    lengths = range(2, min(len(name), controls.longest) + 1)
    return any(name[-length:] in controls.heads or name[:length] in controls.tails for length in lengths)


class _Controls(NamedTuple):
    """Patterns of control tokens and of the signs in them, and the pieces they begin and end with: at least 2
    characters, one of them a sign."""

    whole: re.Pattern[str]
    marks: re.Pattern[str]
    heads: frozenset[str]
    tails: frozenset[str]
    longest: int


@lru_cache(maxsize=64)
def _controls(control_texts: tuple[str, ...]) -> _Controls:
    heads = {text[:end] for text in control_texts for end in range(2, len(text))}
    tails = {text[start:] for text in control_texts for start in range(1, len(text) - 1)}
    return _Controls(
        re.compile(_any_of(sorted({*control_texts}))),
        re.compile("|".join(map(re.escape, {*re.findall(r"\W", "".join(control_texts))})) or "(?!)"),
        frozenset(head for head in heads if not _WORD.fullmatch(head)),
        frozenset(tail for tail in tails if not _WORD.fullmatch(tail)),
        max(map(len, control_texts)),
    )


def _any_of(texts: Sequence[str]) -> str:
    """A pattern of sorted texts that tries a common prefix once: some models have thousands."""
    if "" in texts:
        return ""
    if len(texts) == 1:
        return re.escape(texts[0])
    pairs = enumerate(zip(texts[0], texts[-1], strict=False))
    same = next((at for at, (first, last) in pairs if first != last), len(texts[0]))
    start, rest = texts[0][:same], [text[same:] for text in texts]
    groups = [list(group) for _, group in groupby(rest, key=lambda text: text[:1])]
    return re.escape(start) + "(?:" + "|".join(map(_any_of, groups)) + ")"


def castor_prompt(tools: Tools) -> str:
    """The prompt that declares functions to models whose templates cannot."""
    outlines = [
        {"name": function.name}
        | ({"description": function.description} if function.description else {})
        | {"parameters": function.parameters or {}}
        for function in tools.functions
    ]
    functions = "\n".join(json.dumps(outline, ensure_ascii=False) for outline in outlines)
    return CASTOR_PROMPT.replace("FUNCTIONS", functions)


def _declaration_problems(
    declared: Sequence[tuple[str, FunctionDeclaration]], control_texts: Sequence[str]
) -> Iterator[FieldViolation]:
    if len(declared) > MAX_FUNCTIONS:
        yield _problem("tools", f"{len(declared)} functions are declared, but at most {MAX_FUNCTIONS} can be.")
        return
    seen: set[str] = set()
    for path, declaration in declared:
        if not NAME.fullmatch(declaration.name):
            yield _problem(f"{path}.name", BAD_NAME)
        elif declaration.name in seen:
            yield _problem(f"{path}.name", f"Duplicate function declaration found: {declaration.name}")
        seen.add(declaration.name)
        for old, new in (("parameters", "parameters_json_schema"), ("response", "response_json_schema")):
            if getattr(declaration, old) is not None and getattr(declaration, new) is not None:
                yield _problem(f"{path}.{new}", f"{old} is given too; only one of them can be.")
        for name in ("parameters", "parameters_json_schema", "response", "response_json_schema"):
            for problem in data_problems(getattr(declaration, name), control_texts):
                yield _problem(f"{path}.{name}", problem)
        if may_become_control(declaration.name, control_texts):
            name = shown(declaration.name)
            yield _problem(f"{path}.name", f"{name} contains a control token of the model; rename it.")


def _mode_problems(
    declared: Sequence[tuple[str, FunctionDeclaration]], config: FunctionCallingConfig
) -> Iterator[FieldViolation]:
    path = "tool_config.function_calling_config"
    if config.mode in _CHOOSING and not declared:
        yield _problem(path, f"Function calling mode {config.mode} is set without function_declarations.")
        return
    if config.allowed_function_names and config.mode not in _CHOOSING:
        mode = config.mode or "AUTO"
        yield _problem(
            f"{path}.allowed_function_names", f"can only be set with mode ANY or VALIDATED, but the mode is {mode}."
        )
    if len(config.allowed_function_names) > MAX_FUNCTIONS:
        named = len(config.allowed_function_names)
        yield _problem(
            f"{path}.allowed_function_names",
            f"{named} names are given, but at most {MAX_FUNCTIONS} can be; send each once.",
        )
        return
    names = {declaration.name for _, declaration in declared}
    for index, name in enumerate(config.allowed_function_names):
        if name not in names:
            yield _problem(
                f"{path}.allowed_function_names[{index}]", f"{shown(name)} is not among the function_declarations."
            )


def _problem(field: str, text: str) -> FieldViolation:
    return FieldViolation(field, f"* GenerateContentRequest.{field}: {text}")


def _plain_types(schema: Any) -> Any:
    """A schema with its types as JSON Schema spells them, whether they came in upper case or as numbers."""
    if isinstance(schema, list):
        return [_plain_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: value if key in _DATA else _plain_value(key, value) for key, value in schema.items()}


def _plain_value(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, dict):
        return {name: _plain_types(schema) for name, schema in value.items()}
    if key != "type":
        return _plain_types(value)
    if isinstance(value, str) and value.lower() in TYPES:
        return value.lower()
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= len(TYPES):
        return TYPES[value - 1]
    return [_plain_value(key, item) for item in value] if isinstance(value, list) else _plain_types(value)
