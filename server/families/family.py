"""Describes a family of models: how it writes thoughts and calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ResponseField = Mapping[str, Any]
"""One field of a response template of transformers (``transformers.utils.chat_parsing``)."""


@dataclass(frozen=True, slots=True)
class JsonArguments:
    """The arguments are a JSON object."""


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """Each argument is wrapped in tags of its own: strings as they are, everything else as JSON."""

    start: str
    """Before a value; ``{name}`` stands for the argument's name."""
    end: str
    """After a value."""


@dataclass(frozen=True, slots=True)
class BareKeyArguments:
    """An object that is JSON except for its bare keys and the quotes around its strings."""

    quote: str
    """A token of its own, before and after each string."""


@dataclass(frozen=True, slots=True)
class PythonArguments:
    """Keyword arguments of a call in Python: ``city='Paris', days=3``."""


Arguments = JsonArguments | TaggedArguments | BareKeyArguments | PythonArguments


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a model writes function calls, in this order:

    ``section_start``, for each call ``call_start``, the name, ``name_args_separator``, the arguments and ``call_end``,
    with ``call_separator`` between two calls, and ``section_end``.
    """

    response_field: ResponseField
    """Reads calls back: the field ``tool_calls`` of the response template."""
    trigger: str
    """The text that marks the start of calls; "" where a call is only recognised at the beginning of an answer."""
    terminator: str
    """The text that ends a call; "" where only the next call or the end of the answer does."""
    call_start: str
    name_args_separator: str
    """``{name}`` stands for the name, where models repeat it."""
    call_end: str
    number_mark: str = ""
    """Before the number of a call, which follows its name; "" where calls have none."""
    call_id: str = "call{number:05d}"
    """The id of a call in a conversation, from its ``name`` and ``number``: some templates write it in place of the
    name. This one has the nine letters and digits that Mistral's insist on."""
    calls_within: str = ""
    """Where ``response_field`` reads a section of several calls: matches one with its ``name`` and ``body``."""
    late_sign: str = ""
    """Where plain text may hold the trigger: what follows the name and only occurs in calls."""
    call_token: str = ""
    """A special token that may stand before calls without a trigger."""
    call_separator: str = "\n"
    section_start: str = ""
    section_end: str = ""
    arguments: Arguments = JsonArguments()
    is_parallel: bool = True
    """Whether an answer may hold several calls."""
    keeps_duplicates: bool = True
    """Whether a call that repeats an earlier one of the same answer counts."""

    def write(self, *calls: tuple[str, str]) -> str:
        """Calls as the model writes them: of each the name, and the arguments in the model's own notation."""
        texts = [
            f"{self.call_start}{name}{self.number_mark and f'{self.number_mark}{number}'}{self.separator(name)}{args}"
            f"{self.call_end}"
            for number, (name, args) in enumerate(calls)
        ]
        return f"{self.section_start}{self.call_separator.join(texts)}{self.section_end}"

    @property
    def sign(self) -> str:
        """The text by which a call is known, as `trigger`."""
        return self.late_sign or self.trigger

    def separator(self, name: str) -> str:
        """What stands between the name of a call, or its number, and the arguments."""
        return self.name_args_separator.replace("{name}", name)


@dataclass(frozen=True, slots=True)
class Family:
    """The models whose chat templates share a syntax."""

    name: str
    recognised_by: tuple[str, ...]
    """Texts that all occur in each of the family's chat templates."""
    call: CallSyntax
    incomplete: tuple[str, ...] = ()
    """Texts that all occur in templates of the family that do not show calls, and so have none of its signs."""
    opening: str = ""
    """What makes such a template show them: Jinja before it that writes calls into the messages, where control tokens
    come from a template and not from a text of the caller."""
    thought: tuple[str, str] | None = None
    """The texts around thoughts; None where the model cannot think."""
    markers: tuple[str, ...] = ()
    """The texts of tokens, often special ones, that the parser of answers must see."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end an answer, besides those that the model's files name."""
    answer_header: str = ""
    """What the model writes before an answer's plain text."""
    content: ResponseField = field(default_factory=lambda: {"content": "text", "content_args": {"strip": False}})
    """Reads plain text back."""
    markup_fields: Mapping[str, ResponseField] = field(default_factory=dict)
    """Read what is neither text nor thought nor call, which is dropped."""
    renders_tools: bool = True
    """False where Castor's own prompt declares the functions and shows the calls."""
    thinking_switch: str | None = None
    """The template's variable that turns thinking on or off, if it has one."""
    effort_switch: str | None = None
    """The template's variable that takes one of ``efforts``, if it has one."""
    efforts: tuple[str, ...] = ("low", "medium", "high")
    budget_switch: str | None = None
    """The template's variable that takes the most tokens of thoughts, -1 for any number, if it has one."""
    no_think_word: str = ""
    """What turns thinking off in the system message, where the template has no variable for it."""
    reasoning_key: str = "reasoning_content"
    """The key of a message under which the template looks for earlier thoughts."""
    own_fields: Mapping[str, ResponseField] | None = None
    """The fields of the tokenizer's own response template; they replace those of the family."""

    @property
    def is_known(self) -> bool:
        """False for the family of all templates that no other family recognises."""
        return bool(self.recognised_by)

    @property
    def switches(self) -> tuple[str, ...]:
        """The variables and words of the template by which requests set how much the model thinks."""
        found = (self.thinking_switch, self.effort_switch, self.budget_switch, self.no_think_word)
        return tuple(name for name in found if name)

    @property
    def exempt(self) -> tuple[tuple[str, str], ...]:
        """Where stop sequences do not apply besides calls: the header of an answer, from its beginning to its end."""
        if not self.answer_header:
            return ()
        end = self.answer_header.rindex("<")
        return ((self.answer_header[:end], self.answer_header[end:]),)

    def response_template(self, calls: bool) -> dict[str, Any]:
        """What transformers' ``ResponseParser`` needs: fields ``reasoning_content``, ``tool_calls`` and ``content``,
        and those of markup. Without ``calls`` a call is plain text.

        The parser's prefix is what the prompt already contains of the answer: the opening of its thoughts or nothing.
        """
        fields: dict[str, ResponseField]
        if self.own_fields:
            fields = dict(self.own_fields)
        else:
            fields = {"tool_calls": self.call.response_field, "content": self.content, **self.markup_fields}
            if self.thought:
                begin, end = self.thought
                fields["reasoning_content"] = {"open": begin, "close": end, "content": "text"}
        if not calls:
            fields.pop("tool_calls", None)
        return {"defaults": {}, "fields": {n: dict(f) for n, f in fields.items()}, "start_anchor_pattern": r"\A"}
