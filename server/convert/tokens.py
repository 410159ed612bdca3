"""The model's own tokenizer and chat template: messages in, token ids out, off the event loop and without torch.

Text of users never becomes a control token. transformers sanitises by toggling state of the tokenizer, which gives
wrong encodings under threads, so a tokenizer is used by one thread at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from queue import Empty, SimpleQueue
from types import MappingProxyType
from typing import Any, NotRequired, TypedDict

from jinja2 import TemplateError

from server.errors import InvalidArgument
from server.families import Family, family_of
from server.transformers_import import library

BULKY_CHARACTERS = 100_000
MIN_CHARACTERS_PER_TOKEN = 64
_MARK = "castorprobe"


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


class ChatTokenizer:
    """Renders chats of one model and knows its tokens. The constructor reads files for seconds: call it in a thread.

    ``folder`` holds tokenizer.json and, for chat models, a template. ``threads`` (at least 2) run the rendering: one
    of them takes the bulky texts alone, so that these delay nobody else and their memory (some 150 bytes a character)
    is needed once.

    ``end_ids`` are the tokens that end an answer, ``has_system_role`` tells whether the template renders system
    messages, ``longest_token`` is the most characters that one token is taken to cover. ``family`` says how thoughts
    and calls are written, ``thought_ids`` are the tokens of the markers around thoughts, if the model thinks, and
    ``marker_ids`` the special tokens that parsers of answers must see. ``special_ids`` are all special tokens by text,
    ``atom_ids`` those that grammars name by number; ``control_texts`` are the texts that names must not contain.
    """

    def __init__(self, folder: Path, threads: int = 2) -> None:
        first = _load(folder)
        _require_sanitising(first)
        self._folder = folder
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._free.put(first)
        self._normal = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="render")
        self._bulky = ThreadPoolExecutor(1, thread_name_prefix="render-bulky")
        self._decoder = first.backend_tokenizer.decoder
        self._pieces: dict[int, str] = {index: piece for piece, index in first.get_vocab().items()}
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)
        self.has_template = first.chat_template is not None
        self.has_system_role = self.has_template and _renders_system(first)
        self.family = _family(first)
        self.special_ids = {
            token.content: index for index, token in first.added_tokens_decoder.items() if token.special
        }
        self.atom_ids = {token.content: index for index, token in first.added_tokens_decoder.items() if is_atom(token)}
        self.control_texts = tuple(_control_texts(first))
        self.marker_ids = tuple(self.special_ids[text] for text in self.family.markers if text in self.special_ids)
        self.thought_ids = _thought_ids(first, self.family)
        self.end_ids = tuple(sorted(set(_end_ids(folder, first, self.family))))
        self.longest_token = max(MIN_CHARACTERS_PER_TOKEN, *map(len, self._pieces.values()))

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The prompt's token ids, with exactly one BOS where the model has one, up to where the answer begins.

        ``tools`` and ``options`` (variables of the template) are for chat templates. Without a template (base models)
        the prompt is the texts, joined by a newline.
        Raises ``InvalidArgument`` if the template refuses the conversation or nothing is left to answer.
        """
        lane = self._normal if _characters([messages, tools]) < BULKY_CHARACTERS else self._bulky
        job = partial(self._render, list(messages), list(tools), options)
        return await asyncio.get_running_loop().run_in_executor(lane, job)

    def fits(self, messages: Sequence[Message], context: int) -> bool:
        """False if the texts certainly do not fit into ``context`` tokens: no token covers more than ``longest_token``
        characters (white space at the ends, which templates strip, not counted)."""
        return sum(len(message["content"].strip()) for message in messages) < context * self.longest_token

    def close(self) -> None:
        """Let the threads end; renderings that wait are dropped."""
        self._normal.shutdown(wait=False, cancel_futures=True)
        self._bulky.shutdown(wait=False, cancel_futures=True)

    def _render(self, messages: list[Message], tools: list[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        with self._borrowed() as tokenizer:
            try:
                if self.has_template:
                    ids = _chat_ids(tokenizer, messages, tools, options)
                else:
                    ids = _plain_ids(tokenizer, messages)
            except (TemplateError, TypeError, LookupError, AttributeError) as error:
                raise InvalidArgument(f"The model's chat template refuses this conversation: {error}") from error
            except ValueError as error:
                raise InvalidArgument(f"The conversation cannot be encoded: {error}") from error
        if not ids:
            raise InvalidArgument("* GenerateContentRequest.contents: contents have no text to answer")
        return ids

    @contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """A tokenizer for this thread alone; there are never more than threads, and most are made when first needed."""
        try:
            tokenizer = self._free.get_nowait()
        except Empty:
            tokenizer = _load(self._folder)
        try:
            yield tokenizer
        finally:
            self._free.put(tokenizer)

    def _token_text(self, token_id: int) -> str:
        """The text that a token adds in the middle of an answer; bytes of an incomplete character are U+FFFD."""
        piece = self._pieces.get(token_id, "")
        # Decoders strip the space at the start of a text, so the token is decoded behind an anchor.
        text: str = self._decoder.decode(["a", piece]) if self._decoder is not None else f"a{piece}"
        return text[1:]


def _load(folder: Path) -> Any:
    """A tokenizer made from tokenizer.json as it is, the same file that the engine decodes with."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; a model folder needs a fast tokenizer")
    return library().tokenizers.from_pretrained(str(folder), local_files_only=True)


def _require_sanitising(tokenizer: Any) -> None:
    """An older transformers would take the wish for a variable of the template, and say nothing."""
    if "sanitize_control_tokens" not in signature(tokenizer.apply_chat_template).parameters:
        raise ImportError("the installed transformers cannot keep control tokens out of the text of users: update it")


def _chat_ids(
    tokenizer: Any, messages: list[Message], tools: list[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
        add_generation_prompt=True,
        **options,
    )
    return _with_one_bos(tokenizer, ids)


def _plain_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
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


def _renders_system(tokenizer: Any) -> bool:
    """Try it: templates without the role raise, or drop the message."""
    trial = [{"role": "system", "content": _MARK}, {"role": "user", "content": "x"}]
    try:
        return _MARK in tokenizer.apply_chat_template(trial, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False


def _family(tokenizer: Any) -> Family:
    template = tokenizer.chat_template or ""
    own = getattr(tokenizer, "response_template", None)
    return family_of(template, bool(template) and _renders_tools(tokenizer), own if isinstance(own, dict) else None)


def _renders_tools(tokenizer: Any) -> bool:
    """Try it: many templates show neither declarations nor calls nor what came of them."""
    function = {"name": f"{_MARK}_f", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "callprobe", "type": "function", "function": {"name": f"{_MARK}_c", "arguments": {}}}
    trial = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": f"{_MARK}_r", "name": f"{_MARK}_c", "tool_call_id": "callprobe"},
    ]
    tools = [{"type": "function", "function": function}]
    try:
        text = tokenizer.apply_chat_template(trial, tools=tools, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
    return all(f"{_MARK}_{sign}" in text for sign in "fcr")


def is_atom(token: Any) -> bool:
    """Whether llguidance takes an added token for a special one, as it does with those in angle brackets."""
    return bool(token.special or re.fullmatch(r"<.*>", token.content, re.DOTALL))


def _control_texts(tokenizer: Any) -> Iterator[str]:
    """Special tokens, and others that the template writes: texts that mean something to the model."""
    for token in tokenizer.added_tokens_decoder.values():
        if (token.special or token.content in (tokenizer.chat_template or "")) and not token.content.isspace():
            yield token.content


def _thought_ids(tokenizer: Any, family: Family) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if family.thought is None:
        return None
    begin, end = (tuple(tokenizer.encode(marker, add_special_tokens=False)) for marker in family.thought)
    return begin, end


def _characters(value: Any) -> int:
    """The length of all texts in ``value``, names included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value)) + sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, Sequence) else 0


def _end_ids(folder: Path, tokenizer: Any, family: Family) -> Iterator[int]:
    """Every token that the model's files, its tokenizer or its template name as the end of an answer."""
    for name in ("generation_config.json", "config.json"):
        yield from _configured_eos(folder / name)
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id
    yield from (tokenizer.get_added_vocab()[end] for end in family.ends if end in tokenizer.get_added_vocab())
    yield from _turn_end(tokenizer)


def _configured_eos(path: Path) -> list[int]:
    if not path.is_file():
        return []
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    found = eos if isinstance(eos, list) else [eos]
    return [token for token in found if isinstance(token, int)]


def _turn_end(tokenizer: Any) -> list[int]:
    """The special token that the template writes right behind an assistant's text, if it writes one."""
    if tokenizer.chat_template is None:
        return []
    trial = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
    try:
        _, _, tail = tokenizer.apply_chat_template(trial, tokenize=False).partition(_MARK)
    except TemplateError:
        return []
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    starting = [token for token in special if tail.lstrip().startswith(token)]
    return [special[max(starting, key=len)]] if starting else []
