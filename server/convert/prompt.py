"""Turns a checked request into the input of the chat template, and that into the token ids of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from engine.api.engine import ModelInfo
from engine.api.sampling import Thinking
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer, TooManyTokens
from server.convert.messages import chat_messages, no_thoughts
from server.convert.rendering import TemplateInput
from server.convert.thinking import thinking_for
from server.convert.tools import Tools, castor_prompt, read_tools
from server.convert.turns import Reopen
from server.errors import InvalidArgument
from server.wire.json_schema import check_size
from server.wire.requests import GenerateContentRequest

COUNTED_CHARACTERS = 2_000_000
"""countTokens takes this many for any model, and for a model of a long context as many as might fit it."""
TOOLS_TIMES = 5
"""How many times larger than one schema those of all functions together may be."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request as the model will see it: the template's input, the functions it may call, the bounds of its thoughts.

    ``bare`` is the same without the texts of documents, None where there are no documents. ``characters`` counts the
    texts, and ``owner`` is who sent it.
    """

    chat: TemplateInput
    bare: TemplateInput | None = None
    tools: Tools | None = None
    thinking: Thinking | None = None
    characters: int = 0
    owner: str = ""


def conversation(
    request: GenerateContentRequest,
    spec: ModelSpec,
    tokenizer: ChatTokenizer,
    reopen: Reopen = no_thoughts,
    emptied: GenerateContentRequest | None = None,
    owner: str = "",
    counting: bool = False,
) -> Conversation:
    """The conversation of a request whose documents have become texts; ``emptied`` is the same request with these texts
    empty, None where there are no documents. With ``counting`` it need not be one that can be answered. Takes seconds
    for the longest. Raises ``InvalidArgument``."""
    family = tokenizer.family
    tools = read_tools(request, tokenizer.control_texts)
    if tools:
        check_size([function.parameters for function in tools.functions], "tools", times=TOOLS_TIMES)
    options, thinking = thinking_for(request.generation_config, family, spec, tokenizer)
    additions = (
        castor_prompt(tools) if tools and not family.renders_tools else "",
        family.no_think_word if thinking and thinking.budget == 0 else "",
    )
    messages_of = partial(
        chat_messages,
        has_system_role=tokenizer.has_system_role,
        family=family,
        preamble="\n\n".join(filter(None, additions)),
        control_texts=tokenizer.control_texts,
        reopen=reopen if family.thought else no_thoughts,
        late_system=tokenizer.has_late_system,
        counting=counting,
    )
    messages = messages_of(request)
    declared = tools.for_template() if tools and family.renders_tools else []
    chat = TemplateInput(messages, declared, options)
    bare = None if emptied is None else TemplateInput(messages_of(emptied), declared, options, chat.size)
    # Templates strip white space at the ends.
    characters = sum(len(message["content"].strip()) for message in messages)
    return Conversation(chat, bare, tools, thinking, characters, owner)


async def prompt_tokens(context: int, conversation: Conversation, tokenizer: ChatTokenizer) -> tuple[int, int]:
    """How many tokens the prompt has, also beyond a context of ``context`` tokens, and how many of them its documents
    brought. Raises ``InvalidArgument``."""
    most = max(COUNTED_CHARACTERS, context * tokenizer.longest_token)
    if conversation.characters > most:
        raise InvalidArgument(
            f"The input has {conversation.characters} characters; at most {most} are counted at once. "
            "Count it in parts."
        )
    total = await tokenizer.count(conversation.chat, owner=conversation.owner)
    return total, await _document_tokens(total, conversation, tokenizer)


async def prompt_within(info: ModelInfo, conversation: Conversation, tokenizer: ChatTokenizer) -> tuple[list[int], int]:
    """The prompt, if it leaves room for an answer in the model's context, and how many of its tokens its documents
    brought. Raises ``InvalidArgument``.

    Texts that cannot fit are refused before they are encoded, which takes seconds and gigabytes for the longest.
    """
    context = info.max_context
    most, because = context - 1, f" This model holds no more: {info.context_limit}." if info.context_limit else ""
    if not tokenizer.fits(conversation.characters, context):
        raise InvalidArgument(
            f"The input of {conversation.characters} characters exceeds the maximum number of tokens allowed "
            f"({most}).{because}"
        )
    try:
        prompt = await tokenizer.render(conversation.chat, owner=conversation.owner, most=most)
    except TooManyTokens as too_long:
        raise InvalidArgument(
            f"The input token count ({too_long.count}) exceeds the maximum number of tokens allowed ({most}): "
            f"the model's context of {context} tokens holds the input and at least one token of the answer.{because}"
        ) from None
    return prompt, await _document_tokens(len(prompt), conversation, tokenizer)


async def _document_tokens(prompt_tokens: int, conversation: Conversation, tokenizer: ChatTokenizer) -> int:
    """How many tokens of a prompt its documents brought: those that are not there when they are empty."""
    if conversation.bare is None:
        return 0
    try:
        return prompt_tokens - await tokenizer.count(conversation.bare, owner=conversation.owner)
    except InvalidArgument:  # nothing but the documents has text
        return prompt_tokens
