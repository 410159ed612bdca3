"""The model's own tokenizer and chat template: messages in, token ids out, off the event loop and without torch.

Text of users never becomes a control token. transformers sanitises by toggling state of the tokenizer, which gives
wrong encodings under threads, so a tokenizer is used by one thread at a time. Bulky conversations take seconds and some
150 bytes a character, so a child process with limits encodes them (`server/offload/children.py`).
"""

from __future__ import annotations

import asyncio
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

from server.convert.rendering import Renderer, TemplateInput
from server.convert.template_probe import (
    end_ids,
    family_in,
    is_atom,
    renders_late_system,
    renders_system,
    thought_ids,
)
from server.errors import Internal, InvalidArgument, ResourceExhausted
from server.observability.logs import log
from server.offload.children import ChildDied, ChildProcesses, JobFailed, TookTooLong, TookTooMuch, share_of_memory

BULKY_CHARACTERS = 100_000
ENCODE_SECONDS = 60.0
ENCODE_BYTES = 4 * 1024**3
MIN_CHARACTERS_PER_TOKEN = 64
_BUSY = "Too many long inputs are being encoded. Please try again later."


class TooManyTokens(Exception):
    """A prompt has more tokens than were asked for; ``count`` says how many."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class ChatTokenizer:
    """Renders chats of one model and knows its tokens. The constructor reads files for seconds: call it in a thread.

    ``folder`` holds tokenizer.json and, for chat models, a template. A thread renders conversations, a child process
    the bulky ones, one at a time, so that these do not delay other callers.

    ``end_ids`` are the tokens that end an answer, ``has_system_role`` says whether the template renders system
    messages, ``has_late_system`` whether it does so after the first, ``longest_token`` is the most characters that one
    token is assumed to cover. ``family`` says how thoughts and calls are written, ``thought_ids`` are the tokens of the
    markers around thoughts, if the model thinks, and ``marker_ids`` the special tokens that parsers of answers must
    see. ``special_ids`` are all special tokens by text, ``atom_ids`` those that grammars name by number;
    ``control_texts`` are the texts that names must not contain.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._renderer = Renderer(folder)
        first = self._renderer.tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._turn = asyncio.Lock()
        self._child_memory = share_of_memory(ENCODE_BYTES)
        self._child = ChildProcesses(1, self._child_memory, _BUSY, partial(_load_in_child, str(folder)))
        self._decoder = first.backend_tokenizer.decoder
        self._pieces: dict[int, str] = {index: piece for piece, index in first.get_vocab().items()}
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)
        self.has_template = first.chat_template is not None
        self.has_system_role = self.has_template and renders_system(first)
        self.has_late_system = self.has_system_role and renders_late_system(first)
        self.family = family_in(first)
        self.special_ids = {
            token.content: index for index, token in first.added_tokens_decoder.items() if token.special
        }
        self.atom_ids = {token.content: index for index, token in first.added_tokens_decoder.items() if is_atom(token)}
        self.control_texts = self._renderer.control_texts
        self.marker_ids = tuple(self.special_ids[text] for text in self.family.markers if text in self.special_ids)
        self.thought_ids = thought_ids(first, self.family)
        self.end_ids = tuple(sorted(set(end_ids(folder, first, self.family))))
        self.longest_token = max(MIN_CHARACTERS_PER_TOKEN, *map(len, self._pieces.values()))

    async def render(self, chat: TemplateInput, *, owner: str = "", most: int | None = None) -> list[int]:
        """The prompt's token ids, with exactly one BOS where the model has one, up to where the answer begins.

        Without a template (base models) the prompt is the texts, joined by a newline. ``owner`` identifies the caller:
        callers with bulky conversations take turns. Raises ``TooManyTokens`` for more than ``most``;
        ``InvalidArgument`` if the template refuses the conversation, if nothing is left to answer, or if it takes too
        much to encode; ``ResourceExhausted`` while too many are encoded.
        """
        if chat.size < BULKY_CHARACTERS:
            async with self._turn:  # not the queue of the thread, which would keep the interpreter from the event loop
                ids = await asyncio.get_running_loop().run_in_executor(self._thread, self._renderer.ids, chat)
            count = len(ids)
        else:
            count, data = await self._encoded_in_child(chat, owner, most)
            ids = array("I", data).tolist()
        if most is not None and count > most:
            raise TooManyTokens(count)
        return ids

    async def count(self, chat: TemplateInput, *, owner: str = "") -> int:
        """How many tokens `render` would give. Raises as that does."""
        try:
            return len(await self.render(chat, owner=owner, most=0))
        except TooManyTokens as prompt:
            return prompt.count

    async def resume_points(self, chat: TemplateInput, ids: list[int], *, owner: str = "") -> tuple[int, ...]:
        """How many tokens of the prompt ``ids`` later requests of the conversation repeat (`Renderer.resume_points`).

        Nothing is known, and no request fails, where finding out takes too much.
        """
        if chat.size < BULKY_CHARACTERS:
            async with self._turn:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._thread, self._renderer.resume_points, chat, ids)
        try:
            points: tuple[int, ...] = await self._child.run(
                resumed, str(self._folder), chat, ids, owner=owner, seconds=ENCODE_SECONDS, patience=None
            )
            return points
        except (TookTooLong, TookTooMuch, ChildDied, JobFailed) as failure:
            log.warning("what later requests repeat of a conversation is not known", reason=str(failure))
            return ()

    def fits(self, characters: int, context: int) -> bool:
        """False if texts of this many characters certainly do not fit into ``context`` tokens: no token covers more
        than ``longest_token``."""
        return characters < context * self.longest_token

    async def close(self) -> None:
        """End the thread and the child; renderings that wait are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await self._child.close()

    async def _encoded_in_child(self, chat: TemplateInput, owner: str, most: int | None) -> tuple[int, bytes]:
        try:
            count, data = await self._child.run(
                encoded, str(self._folder), chat, most, owner=owner, seconds=ENCODE_SECONDS, patience=None
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


def encoded(folder: str, chat: TemplateInput, most: int | None) -> tuple[int, bytes]:
    """Runs in a child for `ChatTokenizer.render`: the number of tokens and, if not over ``most``, their ids, 4 bytes
    each."""
    ids = _renderer(folder).ids(chat)
    return len(ids), array("I", ids if most is None or len(ids) <= most else ()).tobytes()


def resumed(folder: str, chat: TemplateInput, ids: list[int]) -> tuple[int, ...]:
    """Runs in a child for `ChatTokenizer.resume_points`."""
    return _renderer(folder).resume_points(chat, ids)


def _load_in_child(folder: str) -> None:
    _renderer(folder)


@lru_cache(maxsize=1)
def _renderer(folder: str) -> Renderer:
    return Renderer(Path(folder))
