"""The request fields that an operator accepts without effect: their names must be fields of the wire."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from server.config.errors import ConfigError
from server.config.models_file import ModelSpec
from server.wire.requests import lenient_paths


def check_lenient(specs: Iterable[ModelSpec], where: str) -> None:
    """Raise ``ConfigError`` for a name that is not a field, or a field that every request needs; ``where`` is the
    models file."""
    known = lenient_paths()
    for spec in specs:
        for path in spec.lenient:
            if path not in known:
                near = " or ".join(get_close_matches(path, known, n=3, cutoff=0.5))
                raise ConfigError(
                    f"{where}, entry {spec.name!r}: lenient names {path!r}, which is no field that a request can do "
                    "without" + (f"; did you mean {near}?" if near else "; docs/api.md lists the fields")
                )
