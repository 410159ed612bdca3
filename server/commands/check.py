"""``castor check SOURCE``: what is known of a model before its weights are loaded, or even fetched."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from engine.api.errors import SourceError
from engine.api.model_report import ModelReport
from engine.api.sampling import SAMPLING_FIELDS
from engine.api.units import size
from engine.weights.sources import inspect
from server.commands.models import models_file, output, sampling_of, specs_in
from server.commands.terminal import console
from server.config.models_file import ModelSpec
from server.config.settings import Settings
from server.convert.rendering import Renderer
from server.convert.sampling import entry_default
from server.convert.template_probe import family_in
from server.families.tagged_calls import CASTOR
from server.families.transformers_import import require_library
from server.models.own_defaults import with_own_defaults
from server.models.registry import engine_config
from server.observability.logs import configure_logging


def check_source(
    settings: Settings, source: str, *, context: int | None, device: str | None, dtype: str | None, as_json: bool
) -> int:
    """Print what is known of the model; return 0 if it can be served here, and 1 with the reason if not.

    ``source`` is a source of models.yaml, or the name of an entry there. No weights are fetched.
    """
    configure_logging(settings.log_level)
    require_library()
    spec = _spec_of(settings, source)
    spec = replace(spec, max_context=context or spec.max_context, device=device or spec.device)
    wanted = engine_config(replace(spec, dtype=dtype or spec.dtype), Path(), settings.cache_dir)
    with tempfile.TemporaryDirectory(prefix="castor-check-") as details, _waiting(source):
        try:
            report, folder = inspect(spec.where(), spec.sha256, settings.cache_dir, wanted, Path(details))
        except SourceError as error:
            report, folder = ModelReport(refused=str(error)), Path(details)
        chat = {} if report.refused else _chat(folder)
        sampling = with_own_defaults(spec, folder)
        missing = [] if report.refused else _missing(source, folder)
    if as_json:
        fields = [field for field in SAMPLING_FIELDS.values() if field.in_entry]
        defaults = {field.name: entry_default(field, sampling) for field in fields}
        found: dict[str, Any] = {"source": source, "servable": not report.problem, "problem": report.problem}
        print(json.dumps({**found, **report.as_json(), **chat, "sampling": defaults, "missing": missing}))
    else:
        rows = {**_rows(report), **_chat_rows(chat), "sampling": "" if report.refused else sampling_of(sampling)}
        rows["undecided"] = report.undecided
        _show({name: text for name, text in rows.items() if text})
        lacks = f" once it has {' and '.join(missing)}" if missing else ""
        verdict = f"cannot be served: {report.problem}" if report.problem else f"can be served{lacks}"
        output().print(f"{source} {verdict}")
    return 1 if report.problem else 0


def _show(rows: dict[str, str]) -> None:
    """Print rows of a name and a text: on a terminal as a table, else one a line, for programs and logs."""
    if sys.stdout.isatty():
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, text in rows.items():
            table.add_row(name, text)
        output(wrap=True).print(table)
    else:
        for name, text in rows.items():
            output().print(f"{name:<15}  {text}")


def _spec_of(settings: Settings, source: str) -> ModelSpec:
    """The entry of models.yaml that has this name or this source; else one made of the source."""
    if not Path(source).exists() and not source.startswith("hf:"):
        for spec in specs_in(models_file(settings)):
            if source in (spec.name, spec.source):
                return spec
    return ModelSpec(name=source, source=source)


@contextmanager
def _waiting(source: str) -> Iterator[None]:
    """Say on a terminal that something happens: libraries take seconds to load."""
    terminal = console()
    if not terminal.is_terminal:
        yield
        return
    with terminal.status(f"looking at {source}"):
        yield


def _chat(folder: Path) -> dict[str, Any]:
    """What the chat template of a folder lets the model do; {} where there is no tokenizer to tell."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    try:
        tokenizer = Renderer(folder).tokenizer
        family = family_in(tokenizer)
    except Exception as error:  # noqa: BLE001 - whatever the library raises on files that somebody made
        return {"template": False, "chat_problem": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {
        "template": tokenizer.chat_template is not None,
        "family": family.name,
        "family_is_fallback": family.name == CASTOR.name,
        "tools_in_template": family.renders_tools,
        "thinks": family.thought is not None,
        "thinking_switch": family.thinking_switch or family.effort_switch,
    }


def _missing(source: str, folder: Path) -> list[str]:
    """What a folder lacks to be served; what is fetched or converted first is no lack."""
    if not Path(source).is_dir():
        return []
    weights = [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    return weights + ([] if (folder / "tokenizer.json").is_file() else ["tokenizer.json"])


def _rows(report: ModelReport) -> dict[str, str]:
    """The report for people; a row without text is not known."""
    rows = {"class": f"{report.class_name} ({report.model_type})" if report.model_type else ""}
    if report.parameters is not None:
        active = f", {report.active_parameters:,} of them for each token" if report.active_parameters else ""
        rows["parameters"] = f"{report.parameters:,}{active}"
    rows["layers"] = ", ".join(f"{count} with {kind}" for kind, count in report.layers)
    others = [kind for kind in report.inputs if kind != "text"]
    rows["input"] = "text" + (f"; {', '.join(others)}: not served yet" if others else "") if report.inputs else ""
    if report.weights_bytes is not None:
        rows["weights"] = f"{size(report.weights_bytes)} in {report.weights_dtype}"
    rows["quantize"] = ", ".join(f"{choice}: {size(wanted)}" for choice, wanted in report.weights_by_choice)
    if report.kv_bytes_per_token is not None and report.context is not None and report.context_bytes is not None:
        rows["keys and values"] = (
            f"{size(report.kv_bytes_per_token)} a token in {report.kv_dtype}; {size(report.context_bytes)} for a "
            f"context of {report.context:,} tokens, in blocks of {report.block_size}"
        )
    if report.state_bytes:
        rows["states"] = f"{size(report.state_bytes)} for each running sequence, and as much for each snapshot"
    if report.longest_context is not None:
        limit = report.context_limit or "what the model was made for"
        rows["longest context"] = f"{report.longest_context:,} tokens: {limit}"
    if report.device_bytes is not None and report.free_bytes is not None:
        rows["device"] = f"{report.device}, {size(report.device_bytes)}, of which {size(report.free_bytes)} are free"
    if report.cache_tokens is not None and report.context is not None:
        fewer = report.cache_tokens < report.context
        cut = "; the context is shortened to that, raise kv_memory for more" if fewer else ""
        about = f"about {report.cache_tokens:,} tokens beside the weights now{cut}"
        rows["room"] = about if report.cache_tokens else "none beside the weights now: end what else uses the device"
    if report.native is not None:
        rows["computed"] = "by C code" if report.native else f"by torch: {report.not_native}"
    return rows


def _chat_rows(chat: dict[str, Any]) -> dict[str, str]:
    if not chat:
        return {}
    if "chat_problem" in chat:
        return {"template": f"cannot be read: {chat['chat_problem']}"}
    if not chat["template"]:
        return {"template": "none: prompts are the plain texts of a conversation"}
    own = "in the template" if chat["tools_in_template"] else "by Castor's own prompt"
    fallback = " (the fallback: the template is of no known family)" if chat["family_is_fallback"] else ""
    switch = f", switched by {chat['thinking_switch']}" if chat["thinking_switch"] else ""
    return {
        "family": f"{chat['family']}{fallback}",
        "tools": own,
        "thinking": f"yes{switch}" if chat["thinks"] else "no",
    }
