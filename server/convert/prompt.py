"""From a checked request to what the chat template gets, and on to the token ids of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine.types import Thinking
from server.convert.documents import NO_DOCUMENTS, Documents
from server.convert.messages import chat_messages, no_thoughts
from server.convert.thinking import thinking_for
from server.convert.tokens import ChatTokenizer, Message
from server.convert.tools import Tools, castor_prompt, read_tools
from server.convert.turns import Reopen
from server.errors import InvalidArgument
from server.spec import ModelSpec
from server.wire.requests import GenerateContentRequest


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is shown to the model: ``messages``, the functions of ``tools`` as ``declared`` for its template, and the
    template's ``options``. ``thinking`` is where its thoughts will stand. ``bare`` are the messages without the texts
    of documents, None where there are no documents."""

    messages: list[Message]
    bare: list[Message] | None = None
    tools: Tools | None = None
    declared: list[dict[str, Any]] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    thinking: Thinking | None = None


def conversation(
    request: GenerateContentRequest,
    spec: ModelSpec,
    tokenizer: ChatTokenizer,
    reopen: Reopen = no_thoughts,
    documents: Documents = NO_DOCUMENTS,
) -> Conversation:
    """A request as the model will see it. Raises ``InvalidArgument``."""
    family = tokenizer.family
    tools = read_tools(request, tokenizer.control_texts)
    options, thinking = thinking_for(request.generation_config, family, spec, tokenizer)
    written = partial(
        chat_messages,
        has_system_role=tokenizer.has_system_role,
        family=family,
        preamble=castor_prompt(tools) if tools and not family.renders_tools else "",
        control_texts=tokenizer.control_texts,
        reopen=reopen if family.thought else no_thoughts,
    )
    messages = written(documents.within(request))
    bare = written(documents.within(request, emptied=True)) if documents else None
    declared = tools.for_template() if tools and family.renders_tools else []
    return Conversation(messages, bare, tools, declared, options, thinking)


async def document_tokens(prompt: Sequence[int], chat: Conversation, tokenizer: ChatTokenizer) -> int:
    """How many tokens of a prompt its documents brought: those that are not there when they are empty."""
    if chat.bare is None:
        return 0
    bare = replace(chat, messages=chat.bare)
    try:
        return len(prompt) - len(await prompt_ids(bare, tokenizer))
    except InvalidArgument:  # nothing else is said
        return len(prompt)


async def prompt_ids(chat: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The whole prompt, however long. Raises ``InvalidArgument``."""
    return await tokenizer.render(chat.messages, chat.declared, chat.options)


async def prompt_within(context: int, chat: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The prompt, if it leaves room for an answer in a context of ``context`` tokens. Raises ``InvalidArgument``.

    Texts that cannot fit are refused before they are tokenized, which would take seconds for the longest bodies.
    """
    if not tokenizer.fits(chat.messages, context):
        characters = sum(len(message["content"]) for message in chat.messages)
        raise InvalidArgument(
            f"The input of {characters} characters exceeds the maximum number of tokens allowed ({context})."
        )
    ids = await prompt_ids(chat, tokenizer)
    if len(ids) >= context:
        raise InvalidArgument(
            f"The input token count ({len(ids)}) exceeds the maximum number of tokens allowed ({context - 1}): "
            f"the model's context of {context} tokens holds the input and at least one token of the answer."
        )
    return ids
