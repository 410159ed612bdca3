"""The sampling defaults that a model brings with it in ``generation_config.json``, as transformers writes it.

They take the place of what an entry of models.yaml leaves open. A prepared GGUF file has this file too, with what its
``general.sampling.*`` metadata say.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.api.sampling import SAMPLING_FIELDS
from server.config.models_file import ModelSpec
from server.observability.logs import log

FILE = "generation_config.json"
MAX_BYTES = 1 << 20


def with_own_defaults(spec: ModelSpec, folder: Path) -> ModelSpec:
    """``spec`` with the defaults of the model in ``folder`` for the sampling fields that the entry does not set."""
    own = own_defaults(folder)
    return replace(spec, **{name: value for name, value in own.items() if getattr(spec, name) is None})


def own_defaults(folder: Path) -> dict[str, Any]:
    """The sampling fields that the file sets, by their names in models.yaml; {} without a file.

    ``do_sample: false`` means greedy, temperature 0. A file or a value that cannot be used is left out with a line in
    the log: the model answers without it.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        content = json.loads(text) if len(text) <= MAX_BYTES else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("sampling defaults not read", file=str(path), reason=str(error))
        return {}
    if not isinstance(content, dict):
        reason = f"it must be a JSON object of at most {MAX_BYTES} bytes"
        log.warning("sampling defaults not read", file=str(path), reason=reason)
        return {}
    found: dict[str, Any] = {}
    for name, field in SAMPLING_FIELDS.items():
        value = content.get(name) if field.in_entry else None
        if value is None:
            continue
        kinds = int if field.counts_tokens else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and value in field.asked:
            found[name] = value
        else:
            reason = f"it must be a {'whole number' if field.counts_tokens else 'number'} {field.asked}"
            shown = str(value)[:100] if isinstance(value, str | int | float) else type(value).__name__
            log.warning("sampling default ignored", file=str(path), field=name, value=shown, reason=reason)
    return found | ({"temperature": 0.0} if content.get("do_sample") is False else {})
