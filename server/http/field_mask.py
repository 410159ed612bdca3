"""Partial answers: the fields that a caller asks for, as Google's ``fields`` parameter and FieldMask name them.

Syntax: ``a,b`` both; ``a/b`` or ``a.b`` what is within; ``a(b,c/d)`` several of those; ``*`` every field. Names are in
camelCase or snake_case. A field that the answer's message does not have is an error, as the real service makes it one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from server.errors import InvalidArgument
from server.wire.answers import ANYTHING, Fields
from server.wire.paths import camel

MAX_CHARACTERS = 2000
MAX_DEPTH = 20
_TOKEN = re.compile(r"[,()/.]|[^\s,()/.]+")

Tree = dict[str, Any]
"""The chosen fields and the ``Tree`` of what is chosen in each; None chooses everything, and so does a field ``*``."""


class FieldMask:
    """A mask for answers with the fields of ``message``.

    Raises ``InvalidArgument`` where ``text`` is no mask, or names a field that they do not have.
    """

    def __init__(self, text: str, message: Fields | None) -> None:
        self._tree: Tree = {}
        for path in _paths(text):
            if not _choose(self._tree, message, path):
                known = message
                for name in path:
                    if not known or not known.get(camel(name)):
                        break
                    known = known[camel(name)]
                raise _invalid(
                    f"Cannot find matching fields for path '{'.'.join(path)[:200]}'. "
                    f"There are: {', '.join(sorted(known or ())) or 'none'}."
                )

    def applied(self, answer: Any) -> Any:
        """What the mask leaves of an answer."""
        return _chosen(answer, self._tree)

    async def each(self, answers: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """What it leaves of each answer of a stream."""
        async with aclosing(answers) as whole:
            async for answer in whole:
                yield _chosen(answer, self._tree)


def _paths(text: str) -> Iterator[tuple[str, ...]]:
    """The paths of a mask, one by one. Raises ``InvalidArgument``."""
    if len(text) > MAX_CHARACTERS:
        raise _invalid(f"It has {len(text)} characters, but at most {MAX_CHARACTERS} are read.")
    outer: list[tuple[str, ...]] = [()]
    path: tuple[str, ...] = ()
    expects_name, closed = True, False
    for token in [*_TOKEN.findall(text), ""]:
        is_name = token not in ("", *",()/.")
        if is_name != expects_name or (closed and token in ("/", ".", "(")):
            expected = "a name" if expects_name else ", or the end"
            raise _invalid(f"{token!r} stands where {expected} is expected." if token else "It ends too early.")
        if is_name:
            path += (token,)
            if len(path) > MAX_DEPTH:
                raise _invalid(f"It goes {len(path)} fields deep, but at most {MAX_DEPTH} are read.")
        elif token == "(":
            outer.append(path)
        elif token not in ("/", "."):
            if not closed:
                yield path
            if token == ")" and len(outer) > 1:
                outer.pop()
            elif token == ")" or (token == "" and len(outer) > 1):
                raise _invalid("It has an unpaired parenthesis.")
            path = outer[-1]
        closed = token == ")"
        expects_name = not is_name and not closed


def _choose(tree: Tree, message: Fields | None, path: Sequence[str]) -> bool:
    """Add a path to what is chosen of a message; whether there is anything at it."""
    (name, *rest), found = path, False
    if message is ANYTHING:
        names = [name] if not rest or name != "*" else []
    elif name == "*":
        names = list(message) if rest else ["*"]
    else:
        names = [camel(name)] if camel(name) in message else []
    for each in names:
        if not rest:
            tree[each] = None
            found = True
            continue
        inner = tree.get(each) or {}
        if _choose(inner, message and message[each], rest):
            tree.setdefault(each, inner)
            found = True
    return found


def _chosen(value: Any, tree: Tree | None) -> Any:
    if tree is None or "*" in tree:
        return value
    if isinstance(value, list):
        return [_chosen(item, tree) for item in value if isinstance(item, (dict, list))]
    return {
        name: _chosen(inner, tree[name])
        for name, inner in value.items()
        if name in tree and (tree[name] is None or isinstance(inner, (dict, list)))
    }


def _invalid(problem: str) -> InvalidArgument:
    """In the words of the real service."""
    return InvalidArgument.at("fields", f"Error expanding 'fields' parameter. {problem}")


EVERYTHING = FieldMask("*", None)
"""The mask where a caller asks for none."""
