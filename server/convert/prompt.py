"""From a checked request to the token ids of its prompt."""

from __future__ import annotations

from server.convert.messages import chat_messages
from server.convert.tokens import ChatTokenizer
from server.errors import InvalidArgument
from server.wire.requests import GenerateContentRequest


async def prompt_ids(request: GenerateContentRequest, tokenizer: ChatTokenizer) -> list[int]:
    """The whole prompt, however long. Raises ``InvalidArgument``."""
    return await tokenizer.render(chat_messages(request, tokenizer.has_system_role))


async def prompt_within(context: int, request: GenerateContentRequest, tokenizer: ChatTokenizer) -> list[int]:
    """The prompt, if it leaves room for an answer in a context of ``context`` tokens. Raises ``InvalidArgument``.

    Texts that cannot fit are refused before they are tokenized, which would take seconds for the longest bodies.
    """
    messages = chat_messages(request, tokenizer.has_system_role)
    if not tokenizer.fits(messages, context):
        characters = sum(len(message["content"]) for message in messages)
        raise InvalidArgument(
            f"The input of {characters} characters exceeds the maximum number of tokens allowed ({context})."
        )
    ids = await tokenizer.render(messages)
    if len(ids) >= context:
        raise InvalidArgument(
            f"The input token count ({len(ids)}) exceeds the maximum number of tokens allowed ({context - 1}): "
            f"the model's context of {context} tokens holds the input and at least one token of the answer."
        )
    return ids
