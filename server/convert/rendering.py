"""A conversation as the token ids of a prompt: the chat template, control tokens, and the one BOS.

transformers keeps whole control tokens in the texts of users from being read as such. It does not see what keys, names
and the template's own words make together, nor what a template makes of a text. So the finished prompt is checked: it
has the control tokens that the template writes, and no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import TemplateError

from server.errors import InvalidArgument
from server.families.transformers_import import library
from server.grammar.schema_dialects import LISTS_OF_SCHEMAS, MAPS_OF_SCHEMAS, SCHEMAS, TYPES, VALUES

_BREAK = "·"
"""Stands where two pieces of text must not become one token."""
_DATA = frozenset(("arguments", "parameters", "return"))
"""What the caller sends stands below these keys; what is above has our keys."""
_KEYWORDS = frozenset(("description", "$defs", *VALUES, *SCHEMAS, *LISTS_OF_SCHEMAS, *MAPS_OF_SCHEMAS))
"""Keys of data that templates look for; all others are the caller's."""
_STRUCTURE = frozenset(("role", "id", "tool_call_id", "type"))
"""Keys of ours whose values are ours too."""


class Message(TypedDict):
    """One turn as chat templates know it; ``role`` is system, user, assistant or tool.

    An assistant may have ``tool_calls`` and the thoughts that stood before them, a tool names the call it answers.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


Messages = Sequence[Message]
Declared = Sequence[Mapping[str, Any]]
Options = Mapping[str, Any]
Change = Callable[[str, bool], str]
"""What a text of the caller becomes; the flag tells that it is a key or a name."""


class Renderer:
    """Renders with the tokenizer of a model folder, ``tokenizer``. Not for two threads at once.

    ``control_texts`` are the texts of the tokens that mean something to the model.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = _load(folder)
        controls = dict(_control_tokens(self.tokenizer))
        self.control_texts = tuple(controls)
        self._control_ids = frozenset(controls.values())
        ends = {end for text in controls for end in (text[0], text[-1])}
        self._ends = re.compile(f"[{re.escape(''.join(sorted(ends)))}]" if ends else "(?!)")

    def ids(self, messages: Messages, tools: Declared, options: Options) -> list[int]:
        """The prompt's token ids, see `ChatTokenizer.render`. Raises ``InvalidArgument``."""
        try:
            if self.tokenizer.chat_template is None:
                ids = _plain_ids(self.tokenizer, messages)
            else:
                ids = _chat_ids(self.tokenizer, messages, tools, options)
                self._check_control_tokens(ids, messages, tools, options)
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidArgument(f"The model's chat template refuses this conversation: {error}") from error
        except ValueError as error:
            raise InvalidArgument(f"The conversation cannot be encoded: {error}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust code; no Exception, so that few catch it
                raise
            raise InvalidArgument("The conversation cannot be encoded: the tokenizer failed.") from None
        if not ids:
            raise InvalidArgument("* GenerateContentRequest.contents: contents have no text to answer")
        return ids

    def _check_control_tokens(self, ids: list[int], messages: Messages, tools: Declared, options: Options) -> None:
        """Compare with the same conversation without the caller's words, and, because templates look at these, with one
        in which they are broken where a control token could begin or end. Raises ``InvalidArgument``."""
        if not tools and not any(map(self._is_doubtful, messages)):
            return
        written = self._controls_in(ids)
        for change in (_blank(), self._broken):
            changed = [_changed(message, change) for message in messages]
            declared = [_changed(tool, change) for tool in tools]
            if self._controls_in(_chat_ids(self.tokenizer, changed, declared, options)) == written:
                return
        raise InvalidArgument(
            "The conversation and the model's chat template together would make a control token of the model where the "
            "template has none. Change names, keys and texts that hold pieces of control tokens, such as "
            f"{self.control_texts[0]}."
        )

    def _is_doubtful(self, message: Message) -> bool:
        return "tool_calls" in message or any(self._ends.search(text) for text in _texts_of(message))

    def _controls_in(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]

    def _broken(self, text: str, is_name: bool) -> str:
        broken = self._ends.sub(rf"\g<0>{_BREAK}", text)
        return f"{_BREAK}{broken}{_BREAK}" if is_name else broken


def _texts_of(message: Message) -> Iterator[str]:
    return (value for key, value in message.items() if key not in _STRUCTURE and isinstance(value, str))


def _blank() -> Change:
    """Texts lose their words, names are numbered."""
    numbers: dict[str, str] = {}

    def change(text: str, is_name: bool) -> str:
        return numbers.setdefault(text, f"n{len(numbers)}") if is_name else "x" if text.strip() else text

    return change


def _changed(value: Any, change: Change, key: str = "", is_ours: bool = True) -> Any:
    """A message or a declaration with another text for each that is the caller's; ``is_ours`` outside of its data."""
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


def _load(folder: Path) -> Any:
    """A tokenizer made from tokenizer.json as it is, the same file that the engine decodes with."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; a model folder needs a fast tokenizer")
    tokenizer = library().tokenizers.from_pretrained(str(folder), local_files_only=True)
    # An older transformers would take the wish for a variable of the template, and say nothing.
    if "sanitize_control_tokens" not in signature(tokenizer.apply_chat_template).parameters:
        raise ImportError("the installed transformers cannot keep control tokens out of the text of users: update it")
    return tokenizer


def _control_tokens(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Special tokens, and others that the template writes."""
    for index, token in tokenizer.added_tokens_decoder.items():
        if (token.special or token.content in (tokenizer.chat_template or "")) and not token.content.isspace():
            yield token.content, index


def _chat_ids(tokenizer: Any, messages: Messages, tools: Declared, options: Options) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
        add_generation_prompt=True,
        **options,
    )
    return _with_one_bos(tokenizer, ids)


def _plain_ids(tokenizer: Any, messages: Messages) -> list[int]:
    text = "\n".join(message["content"] for message in messages)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
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
