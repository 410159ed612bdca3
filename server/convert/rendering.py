"""A conversation as the token ids of a prompt: the chat template, control tokens, and the one BOS.

transformers keeps whole control tokens in users' texts from being encoded as such. It misses those that keys, names and
the template's own text form together, and what a template makes of a text. So the finished prompt is checked: it has
the control tokens that the template writes, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time
from inspect import signature
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import TemplateError

from server.convert.template_text import usable
from server.errors import InvalidArgument
from server.families.transformers_import import library
from server.wire.json_schema import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS, TYPES, VALUE_KEYWORDS

CHARACTERS_PER_MESSAGE = 20
"""What a message costs in addition to its text: templates are programs."""

TEMPLATE_ERRORS = (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises for a conversation that it was not written for: templates are programs."""
_BREAK = "·"
"""Separates two pieces of text that must not become one token."""
_DATA = frozenset(("arguments", "parameters", "return"))
"""Below these keys is the caller's data; above them the keys are ours."""
_KEYWORDS = frozenset(("description", "$defs", *VALUE_KEYWORDS, *SCHEMAS, *LISTS_OF_SCHEMAS, *MAPS_OF_SCHEMAS))
"""Keys of data that templates look for; all others are the caller's."""
_STRUCTURE = frozenset(("role", "id", "tool_call_id", "type"))
"""Our keys whose values are ours too."""


class ChatMessage(TypedDict):
    """One turn as chat templates know it; ``role`` is system, user, assistant or tool.

    An assistant may have ``tool_calls`` and the thoughts before them, a tool names the call it answers.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


Messages = Sequence[ChatMessage]
_CALL = {"id": "call00000", "type": "function", "function": {"name": "x", "arguments": {}}}
_QUESTION: Messages = ({"role": "assistant", "content": "x"}, {"role": "user", "content": "x"})
_TOLD: ChatMessage = {"role": "tool", "content": "x", "name": "x", "tool_call_id": "call00000"}
_RESULT: Messages = ({"role": "assistant", "content": "", "tool_calls": [_CALL]}, _TOLD)
_THOUGHT_RESULT: Messages = (
    {"role": "assistant", "content": "", "tool_calls": [_CALL], "reasoning_content": "x", "thinking": "x"},
    _TOLD,
)
"""What may come next in a conversation: clients give back the thoughts before a call, or do not."""
Declared = Sequence[Mapping[str, Any]]
Options = Mapping[str, Any]
Change = Callable[[str, bool], str]
"""What a text of the caller becomes; the flag says that it is a key or a name."""


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """What a chat template gets: ``messages``, the declared functions as ``tools``, and ``options``, its variables.

    ``size`` is what it costs to render, in characters; it is counted unless given.
    """

    messages: Messages
    tools: Declared = ()
    options: Options = field(default_factory=dict)
    size: int = -1

    def __post_init__(self) -> None:
        if self.size < 0:
            size = _characters([self.messages, self.tools]) + CHARACTERS_PER_MESSAGE * len(self.messages)
            object.__setattr__(self, "size", size)


class Renderer:
    """Renders with the ``tokenizer`` of a model folder. Not thread-safe.

    ``control_texts`` are the texts of the tokens with a special meaning to the model. A template that asks for the time
    by ``clock`` gets the start of the day, also where it writes hours: all prompts of a day begin alike, and the prefix
    cache holds what they share.
    """

    def __init__(self, folder: Path, clock: Callable[[], datetime] = datetime.now) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json; a model folder needs a fast tokenizer")
        # Made from tokenizer.json as it is, the same file that the engine decodes with.
        self.tokenizer = library().tokenizers.from_pretrained(str(folder), local_files_only=True)
        # An older transformers would silently take this option for a template variable.
        if "sanitize_control_tokens" not in signature(self.tokenizer.apply_chat_template).parameters:
            raise ImportError(
                "the installed transformers cannot keep control tokens out of the text of users: update it"
            )
        if isinstance(self.tokenizer.chat_template, str):
            self.tokenizer.chat_template = usable(self.tokenizer)
        self._clock = clock
        # Special tokens, and others that the template writes.
        template = self.tokenizer.chat_template or ""
        controls = {
            token.content: index
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if (token.special or token.content in template) and not token.content.isspace()
        }
        self.control_texts = tuple(controls)
        self._control_ids = frozenset(controls.values())
        ends = {end for text in controls for end in (text[0], text[-1])}
        self._ends = re.compile(f"[{re.escape(''.join(sorted(ends)))}]" if ends else "(?!)")

    def ids(self, chat: TemplateInput) -> list[int]:
        """The prompt's token ids, see `ChatTokenizer.render`. Raises ``InvalidArgument``."""
        try:
            if self.tokenizer.chat_template is None:
                text = "\n".join(message["content"] for message in chat.messages)
                ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
                ids = _with_one_bos(self.tokenizer, ids)
            else:
                if isinstance(self.tokenizer.chat_template, str):
                    library().compiled_template(self.tokenizer.chat_template).globals["strftime_now"] = self._day
                ids = _chat_ids(self.tokenizer, chat)
                self._check_control_tokens(ids, chat)
        except TEMPLATE_ERRORS as error:
            raise InvalidArgument(f"The model's chat template refuses this conversation: {error}") from error
        except ValueError as error:
            raise InvalidArgument(f"The conversation cannot be encoded: {error}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of Rust code, which is no Exception
                raise
            raise InvalidArgument("The conversation cannot be encoded: the tokenizer failed.") from None
        if not ids:
            raise InvalidArgument("* GenerateContentRequest.contents: contents have no text to answer")
        return ids

    def _day(self, form: str) -> str:
        """The start of the day, as ``strftime`` writes it."""
        return datetime.combine(self._clock(), time.min).strftime(form)

    def resume_points(self, chat: TemplateInput, ids: list[int]) -> tuple[int, ...]:
        """How many tokens of a prompt later requests of the conversation have in common with it, ascending.

        What may follow is rendered: an answer and a question, and where there are functions a call and its result.
        Their common beginning with the prompt ends at the latest where the answer begins; templates that drop earlier
        thoughts make it shorter. Without a chat template everything is repeated.
        """
        if self.tokenizer.chat_template is None:
            return (len(ids),)
        possible = (_QUESTION, _RESULT, _THOUGHT_RESULT) if chat.tools else (_QUESTION,)
        return tuple(sorted({point for turn in possible for point in self._repeated(chat, ids, turn)}))

    def _repeated(self, chat: TemplateInput, ids: list[int], next_turn: Messages) -> Iterator[int]:
        """The common beginning of a prompt and the same conversation with its ``next_turn``, if that can be rendered.

        Tried first with the caller's texts blanked, which is quick: what the template writes after the common beginning
        is usually the same then.
        """
        blank = _blank()
        blanked = [_changed(message, blank) for message in chat.messages]
        try:
            for messages, prompt in ((blanked, None), (chat.messages, ids)):
                now, later = (replace(chat, messages=[*messages, *more]) for more in ((), next_turn))
                found = prompt or _chat_ids(self.tokenizer, now)
                same = takewhile(bool, map(eq, found, _chat_ids(self.tokenizer, later)))
                tail = found[sum(same) :]
                if ids[len(ids) - len(tail) :] == tail:
                    yield len(ids) - len(tail)
                    return
        except (*TEMPLATE_ERRORS, ValueError):
            return  # the template allows no such turn here

    def _check_control_tokens(self, ids: list[int], chat: TemplateInput) -> None:
        """Compare with the same conversation without the caller's text and, because templates inspect it, with one
        whose text is broken up where a control token could begin or end. Raises ``InvalidArgument``."""
        if not chat.tools and not any(map(self._is_doubtful, chat.messages)):
            return
        written = self._controls_in(ids)
        for change in (_blank(), self._broken):
            messages = [_changed(message, change) for message in chat.messages]
            tools = [_changed(tool, change) for tool in chat.tools]
            changed = TemplateInput(messages, tools, chat.options, chat.size)
            if self._controls_in(_chat_ids(self.tokenizer, changed)) == written:
                return
        raise InvalidArgument(
            "The conversation and the model's chat template together would make a control token of the model where the "
            "template has none. Change names, keys and texts that hold pieces of control tokens, such as "
            f"{self.control_texts[0]}."
        )

    def _is_doubtful(self, message: ChatMessage) -> bool:
        """Whether a control token could begin or end in a text of the caller."""
        texts = (value for key, value in message.items() if key not in _STRUCTURE and isinstance(value, str))
        return "tool_calls" in message or any(map(self._ends.search, texts))

    def _controls_in(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]

    def _broken(self, text: str, is_name: bool) -> str:
        broken = self._ends.sub(rf"\g<0>{_BREAK}", text)
        return f"{_BREAK}{broken}{_BREAK}" if is_name else broken


def _blank() -> Change:
    """A change that blanks texts and numbers names."""
    numbers: dict[str, str] = {}

    def change(text: str, is_name: bool) -> str:
        return numbers.setdefault(text, f"n{len(numbers)}") if is_name else "x" if text.strip() else text

    return change


def _changed(value: Any, change: Change, key: str = "", is_ours: bool = True) -> Any:
    """A message or a declaration with ``change`` applied to each text of the caller; ``is_ours`` outside of its
    data."""
    if isinstance(value, str):
        is_kept = (is_ours and key in _STRUCTURE) or (key == "type" and value.lower() in TYPES)
        return value if is_kept else change(value, key in ("name", "required"))
    if isinstance(value, Mapping):
        return {
            name if is_ours or name in _KEYWORDS else change(name, True): _changed(
                inner, change, name, is_ours and name not in _DATA
            )
            for name, inner in value.items()
        }
    return [_changed(inner, change, key, is_ours) for inner in value] if isinstance(value, list) else value


def _chat_ids(tokenizer: Any, chat: TemplateInput) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(chat.messages),
        tools=list(chat.tools) or None,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
        add_generation_prompt=True,
        **chat.options,
    )
    return _with_one_bos(tokenizer, ids)


def _with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Templates write the BOS or leave it to the tokenizer, and some do both."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    added: list[int] = tokenizer.encode("", add_special_tokens=True)
    return [bos, *ids] if added[:1] == [bos] and ids[:1] != [bos] else ids


def _characters(value: Any) -> int:
    """The length of all texts in ``value``, names included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value)) + sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, Sequence) else 0
