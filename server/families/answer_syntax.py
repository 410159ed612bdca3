"""How the answers to one request are read: the family's syntax, and what the request declares and demands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from server.families.family import Family, JsonArguments
from server.families.transformers_import import library


class AnswerSyntax:
    """What the parsers of all candidates of a request share.

    ``tools`` are the declared functions as chat templates get them; where there are none, nothing is a call.
    ``open_thought`` says that the prompt ends within thoughts. ``constrained`` says that a grammar governs what comes
    after the thoughts: from its first word on a marker is just text. An answer that is not to be confused with a call
    without a marker begins with none of ``call_starts``.
    """

    def __init__(
        self,
        family: Family,
        tools: Sequence[Mapping[str, Any]] = (),
        open_thought: bool = False,
        constrained: bool = False,
        call_starts: Sequence[str] = (),
    ) -> None:
        self.constrained = constrained
        self.call_starts = tuple(call_starts)
        self.tools = [dict(tool) for tool in tools]
        self.tool_names = frozenset(tool["function"]["name"] for tool in tools)
        self.prefix = family.thought[0] if open_thought and family.thought else ""
        """The start of the answer that the prompt already contains."""
        self.sign = family.call.sign if tools else ""
        self.keeps_duplicates = family.call.keeps_duplicates
        own = family.own_fields is not None
        self.arguments = JsonArguments() if own else family.call.arguments
        self.calls_within = "" if own else family.call.calls_within
        """As in `CallSyntax`; the tokenizer's own response template leaves nothing to be read here."""
        self._kinds = {tool["function"]["name"]: _kinds(tool["function"].get("parameters")) for tool in tools}
        self._response_template = family.response_template(calls=bool(tools))

    def kind(self, function: str, parameter: str) -> str:
        """The declared type of a parameter; "" where there is none, or several."""
        return self._kinds[function].get(parameter, "")

    @cached_property
    def regions(self) -> Any:
        """The family's response template for the library's parser. Every field delivers its text as it is, with what
        its markers captured."""
        fields = {}
        for name, field in self._response_template["fields"].items():
            markers = {key: field[key] for key in ("open", "open_pattern", "close", "close_pattern") if key in field}
            captured = re.findall(r"\(\?P<(\w+)>", markers.get("open_pattern", "") + markers.get("close_pattern", ""))
            if "open_pattern" in markers:
                # White space beside a call is dropped anyway; searching for it takes time quadratic in its length.
                markers["open_pattern"] = markers["open_pattern"].removeprefix(r"\s*")
            transform = {"body": "{content}"} | {capture: f"{{{capture}}}" for capture in captured}
            text = {"content": "text", "content_args": {"strip": False}, "transform": transform}
            fields[name] = {**markers, "repeats": True, **text}
        load = library().chat_parsing.response_templates.load_response_template
        return load({**self._response_template, "fields": fields})

    @cached_property
    def call_field(self) -> Any:
        """The field that reads a call's text; None where nothing is a call."""
        load = library().chat_parsing.response_templates.load_response_template
        return load(self._response_template).fields.get("tool_calls")

    @property
    def quotes_json(self) -> bool:
        """Whether calls hold JSON with ordinary strings, in which a marker is just text."""
        field = self.call_field
        return field is not None and field.content == "json" and "string_delims" not in field.content_args

    @property
    def calls_in_tags(self) -> bool:
        """Whether calls are not JSON: then only the last marker shows that one is complete."""
        return self.call_field is not None and self.call_field.content != "json"


def _kinds(parameters: Any) -> dict[str, str]:
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    declared = properties.items() if isinstance(properties, Mapping) else ()
    types = ((name, schema.get("type")) for name, schema in declared if isinstance(schema, Mapping))
    return {name: kind for name, kind in types if isinstance(kind, str)}
