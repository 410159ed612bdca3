"""The model's own tokenizer and chat template: messages in, token ids out, off the event loop and without torch.

Text of users never becomes a control token. transformers sanitises by toggling state of the tokenizer, which gives
wrong encodings under threads, so a tokenizer is used by one thread at a time. Bulky conversations take seconds and some
150 bytes a character, so a child process with limits encodes them (`server/offload/children.py`).
"""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from server.convert.rendering import Declared, Messages, Options, Renderer
from server.errors import Internal, InvalidArgument, ResourceExhausted
from server.families.family import Family
from server.families.table import family_of
from server.observability.metrics import log
from server.offload.children import ChildDied, ChildProcesses, JobFailed, TookTooLong, TookTooMuch, share_of_memory

BULKY_CHARACTERS = 100_000
CHARACTERS_PER_MESSAGE = 20
"""What a message costs beside its text: templates are programs."""
ENCODE_SECONDS = 60.0
ENCODE_BYTES = 4 * 1024**3
MIN_CHARACTERS_PER_TOKEN = 64
_BUSY = "Too many long inputs are being encoded. Please try again later."
_MARK = "castorprobe"


class TooManyTokens(Exception):
    """A prompt is longer than is wanted; ``count`` says how long."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class ChatTokenizer:
    """Renders chats of one model and knows its tokens. The constructor reads files for seconds: call it in a thread.

    ``folder`` holds tokenizer.json and, for chat models, a template. A thread renders conversations, a child process
    the bulky ones, one at a time, so that these delay nobody else.

    ``end_ids`` are the tokens that end an answer, ``has_system_role`` tells whether the template renders system
    messages, ``longest_token`` is the most characters that one token is taken to cover. ``family`` says how thoughts
    and calls are written, ``thought_ids`` are the tokens of the markers around thoughts, if the model thinks, and
    ``marker_ids`` the special tokens that parsers of answers must see. ``special_ids`` are all special tokens by text,
    ``atom_ids`` those that grammars name by number; ``control_texts`` are the texts that names must not contain.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._renderer = Renderer(folder)
        first = self._renderer.tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._child_memory = share_of_memory(ENCODE_BYTES)
        self._child = ChildProcesses(1, self._child_memory, _BUSY, partial(_load_in_child, str(folder)))
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
        self.control_texts = self._renderer.control_texts
        self.marker_ids = tuple(self.special_ids[text] for text in self.family.markers if text in self.special_ids)
        self.thought_ids = _thought_ids(first, self.family)
        self.end_ids = tuple(sorted(set(_end_ids(folder, first, self.family))))
        self.longest_token = max(MIN_CHARACTERS_PER_TOKEN, *map(len, self._pieces.values()))

    async def render(
        self,
        messages: Messages,
        tools: Declared = (),
        options: Options = MappingProxyType({}),
        *,
        size: int | None = None,
        owner: str = "",
        most: int | None = None,
    ) -> list[int]:
        """The prompt's token ids, with exactly one BOS where the model has one, up to where the answer begins.

        ``tools`` and ``options`` (variables of the template) are for chat templates. Without a template (base models)
        the prompt is the texts, joined by a newline. ``size`` is `size_of` the conversation, and ``owner`` who asks:
        callers with bulky conversations take turns.
        Raises ``TooManyTokens`` for more than ``most``; ``InvalidArgument`` if the template refuses the conversation,
        if nothing is left to answer, or if it takes too much to encode; ``ResourceExhausted`` while too many are
        encoded.
        """
        if (size_of(messages, tools) if size is None else size) < BULKY_CHARACTERS:
            work = partial(self._renderer.ids, messages, tools, options)
            ids = await asyncio.get_running_loop().run_in_executor(self._thread, work)
            count = len(ids)
        else:
            count, data = await self._encoded_in_child((list(messages), list(tools), dict(options), most), owner)
            ids = array("I", data).tolist()
        if most is not None and count > most:
            raise TooManyTokens(count)
        return ids

    async def count(
        self,
        messages: Messages,
        tools: Declared = (),
        options: Options = MappingProxyType({}),
        *,
        size: int | None = None,
        owner: str = "",
    ) -> int:
        """How many tokens `render` would give. Raises as that does."""
        try:
            return len(await self.render(messages, tools, options, size=size, owner=owner, most=0))
        except TooManyTokens as prompt:
            return prompt.count

    def fits(self, characters: int, context: int) -> bool:
        """False if texts of so many characters certainly do not fit into ``context`` tokens: no token covers more than
        ``longest_token``."""
        return characters < context * self.longest_token

    async def close(self) -> None:
        """End the thread and the child; renderings that wait are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await self._child.close()

    async def _encoded_in_child(self, job: tuple[Any, ...], owner: str) -> tuple[int, bytes]:
        try:
            count, data = await self._child.run(
                encoded, str(self._folder), *job, owner=owner, seconds=ENCODE_SECONDS, patience=None
            )
        except TookTooLong:
            raise InvalidArgument(
                f"Encoding the input takes more than {ENCODE_SECONDS:g} seconds; send a shorter one."
            ) from None
        except TookTooMuch:
            raise InvalidArgument(
                f"Encoding the input takes more than {self._child_memory} bytes of memory; send a shorter one."
            ) from None
        except ChildDied as death:
            log.error("a conversation could not be encoded", reason=str(death))
            raise ResourceExhausted("The input could not be encoded now. Please try again later.") from None
        except JobFailed as failure:
            log.error("a conversation could not be encoded", reason=str(failure))
            raise Internal("The input could not be encoded; the server's log has the reason.") from None
        return count, data

    def _token_text(self, token_id: int) -> str:
        """The text that a token adds in the middle of an answer; bytes of an incomplete character are U+FFFD."""
        piece = self._pieces.get(token_id, "")
        # Decoders strip the space at the start of a text, so the token is decoded behind an anchor.
        text: str = self._decoder.decode(["a", piece]) if self._decoder is not None else f"a{piece}"
        return text[1:]


def size_of(messages: Messages, tools: Declared = ()) -> int:
    """What a conversation costs to render, in characters."""
    return _characters([messages, tools]) + CHARACTERS_PER_MESSAGE * len(messages)


def encoded(folder: str, messages: Messages, tools: Declared, options: Options, most: int | None) -> tuple[int, bytes]:
    """What a child does for `ChatTokenizer.render`: how many tokens, and up to ``most`` these, four bytes each."""
    ids = _renderer(folder).ids(messages, tools, options)
    return len(ids), array("I", ids if most is None or len(ids) <= most else ()).tobytes()


def _load_in_child(folder: str) -> None:
    _renderer(folder)


@lru_cache(maxsize=1)
def _renderer(folder: str) -> Renderer:
    return Renderer(Path(folder))


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
