"""What a chat template and a tokenizer can do, found out by trying them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.convert.rendering import TEMPLATE_ERRORS
from server.families.family import Family
from server.families.table import BUDGET_SWITCHES, EFFORT_SWITCHES, NO_THINK_WORD, THINKING_SWITCHES, family_of

_MARK = "castorprobe"


def renders_system(tokenizer: Any) -> bool:
    """Whether the template shows system messages: those without the role raise, or drop the message."""
    return _MARK in _rendered(tokenizer, [{"role": "system", "content": _MARK}, {"role": "user", "content": "x"}])


def renders_late_system(tokenizer: Any) -> bool:
    """Whether the template shows system messages wherever they stand: many raise, or show all at the beginning."""
    roles = ("user", "system", "assistant", "system", "user", "system")
    trial = [{"role": role, "content": f"{_MARK}{place}"} for place, role in enumerate(roles)]
    return re.findall(rf"{_MARK}\d", _rendered(tokenizer, trial)) == [message["content"] for message in trial]


def renders_tools(tokenizer: Any, calls: int = 1) -> bool:
    """Whether the template shows declarations, ``calls`` in one turn, and results of functions; many show none of them,
    and some refuse several calls."""
    function = {"name": f"{_MARK}_f", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": f"{_MARK}_c", "arguments": {}}}
    ids = [f"callprob{number}" for number in range(calls)]
    trial: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": name, **call} for name in ids]},
        *({"role": "tool", "content": f"{_MARK}_r", "name": f"{_MARK}_c", "tool_call_id": name} for name in ids),
    ]
    text = _rendered(tokenizer, trial, tools=[{"type": "function", "function": function}])
    return all(f"{_MARK}_{sign}" in text for sign in "fcr")


def family_in(tokenizer: Any) -> Family:
    """The family that the template belongs to, with the switches that this template has."""
    template = tokenizer.chat_template or ""
    own = getattr(tokenizer, "response_template", None)
    family = family_of(template, bool(template) and renders_tools(tokenizer), own if isinstance(own, dict) else None)
    if family.renders_tools and family.call.is_parallel and not renders_tools(tokenizer, calls=2):
        family = replace(family, call=replace(family.call, is_parallel=False))
    if family.thought is None or not template:
        return family
    switch = _obeyed(tokenizer, THINKING_SWITCHES, True, False)
    return replace(
        family,
        thinking_switch=switch,
        effort_switch=_obeyed(tokenizer, EFFORT_SWITCHES, family.efforts[0], family.efforts[-1]),
        budget_switch=_obeyed(tokenizer, BUDGET_SWITCHES, 0, 512),
        no_think_word=NO_THINK_WORD if not switch and _takes_out(tokenizer, NO_THINK_WORD) else "",
    )


def _obeyed(tokenizer: Any, names: Sequence[str], one: Any, other: Any) -> str | None:
    """The first of the variables whose value changes what the template writes."""
    trial = [{"role": "user", "content": "x"}]
    for name in names:
        if _rendered(tokenizer, trial, **{name: one}) != _rendered(tokenizer, trial, **{name: other}):
            return name
    return None


def _takes_out(tokenizer: Any, word: str) -> bool:
    """Whether the template takes a word out of the system message, as it does with one that it acts upon."""
    text = _rendered(tokenizer, [{"role": "system", "content": f"{_MARK} {word}"}, {"role": "user", "content": "x"}])
    return _MARK in text and word not in text


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation as the template writes it up to the next answer; "" where it refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    except TEMPLATE_ERRORS:
        return ""


def is_atom(token: Any) -> bool:
    """Whether llguidance takes an added token for a special one, as it does with those in angle brackets."""
    return bool(token.special or re.fullmatch(r"<.*>", token.content, re.DOTALL))


def thought_ids(tokenizer: Any, family: Family) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The tokens of the markers around thoughts; None where the model cannot think."""
    if family.thought is None:
        return None
    start, end = (tuple(tokenizer.encode(marker, add_special_tokens=False)) for marker in family.thought)
    return start, end


def end_ids(folder: Path, tokenizer: Any, family: Family) -> Iterator[int]:
    """Every token that the model's files, its tokenizer or its template name as the end of an answer."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        yield from (token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int))
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id
    yield from (tokenizer.get_added_vocab()[end] for end in family.end_tokens if end in tokenizer.get_added_vocab())
    if tokenizer.chat_template is None:
        return
    # The special token that the template writes right behind an assistant's text, if it writes one.
    trial = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
    try:
        _, _, tail = tokenizer.apply_chat_template(trial, tokenize=False).partition(_MARK)
    except TEMPLATE_ERRORS:
        return
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    starting = [token for token in special if tail.lstrip().startswith(token)]
    if starting:
        yield special[max(starting, key=len)]
