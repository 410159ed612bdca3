"""Names of stored tensors: each method has its own endings for the parts of a weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from engine.quantised.settings import damaged

Endings = Mapping[str, tuple[str, str]]
"""A pattern that a tensor's whole name matches, to the name of the weight (``\\1`` is its group) and the role there."""

IGNORED = "ignored"
"""The role of what the numbers do not depend on; further ones of the same weight are "ignored 2" and so on."""


def grouped(
    method: str, names: Collection[str], endings: Endings, needed: Collection[str]
) -> dict[str, dict[str, str]]:
    """The parts of each weight, by ``Method.grouped``. A tensor that has the weight's own name is its part "weight".

    Which modules are quantised is what is stored, so that lists of exceptions need not be read: a weight that one
    excepts has no parts but itself. Raises ``ModelRefused`` where a weight lacks a part that is ``needed``.
    """
    patterns = [(re.compile(pattern), *rest) for pattern, rest in endings.items()]
    found: dict[str, dict[str, str]] = {}
    ignored: list[tuple[str, str]] = []
    for name in names:
        for pattern, weight, role in patterns:
            if match := pattern.fullmatch(name):
                weight = match.expand(weight)
                if role == IGNORED:
                    ignored.append((weight, name))
                else:
                    found.setdefault(weight, {})[role] = name
                break
    whole = set(names)
    for weight, parts in found.items():
        if weight in whole:
            parts["weight"] = weight
        if missing := [role for role in needed if role not in parts]:
            stored = ", ".join(sorted(parts.values()))
            raise damaged(method, f"{weight} has no {' and no '.join(missing)} (there is {stored})")
    for weight, name in ignored:
        # Scales of a cache belong to no weight: they may lie with any.
        if parts := found.get(weight) or next(iter(found.values()), {}):
            count = sum(role.startswith(IGNORED) for role in parts)
            parts[f"{IGNORED} {count + 1}" if count else IGNORED] = name
    return found
