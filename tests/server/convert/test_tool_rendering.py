"""Functions, calls and results in the templates of the families: no text and no name becomes a control token.

What is shown and read back is checked by scripts/template_checks.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.templates import template_folder
from tokenizers import Tokenizer

from server.config.models_file import ModelSpec
from server.convert import rendering
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.messages import chat_messages
from server.convert.prompt import conversation
from server.convert.rendering import ChatMessage, TemplateInput
from server.convert.tools import Function, castor_prompt, read_tools
from server.errors import InvalidArgument
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest

FAMILIES = {
    "DeepSeek-R1": ("deepseek-r1", False),
    "DeepSeek-V3.1": ("deepseek", False),
    "EXAONE-4": ("exaone4", True),
    "GLM-4.6": ("glm", True),
    "GLM-4.7": ("glm-4.7", True),
    "Kimi-K2": ("kimi-k2", True),
    "Kimi-K2-Thinking": ("kimi-k2", True),
    "LFM2": ("lfm2", True),
    "LFM2.5": ("lfm2", True),
    "MiniMax-M2": ("minimax-m2", True),
    "Ministral": ("mistral", True),
    "Mistral-Nemo": ("mistral-list", True),
    "Mistral-Small": ("mistral", True),
    "Muse": ("muse", True),
    "Nemotron-Nano": ("nemotron", True),
    "Phi-3.5": ("castor", False),
    "Phi-4": ("phi", True),
    "Phi-4-mini": ("phi", True),
    "Qwen2.5": ("hermes", True),
    "Qwen3-0.6B": ("hermes", True),
    "Qwen3-Coder": ("qwen-xml", True),
    "Qwen3.5": ("qwen-xml", True),
    "Seed-OSS": ("seed-oss", True),
    "SmolLM3": ("smollm3", False),
    "gemma-4": ("gemma4", True),
    "gpt-oss": ("gpt-oss", True),
    "granite": ("granite4", True),
    "granite-3": ("granite", True),
    "llama3": ("llama3", True),
}
"""By the template; whether it shows functions."""
QUESTION = "How much is it?"
CALLS = [("add", {"a": 1, "b": 'two <b> "2"\nlines'}), ("now", {}), ("add", {"a": -7, "b": "é"})]
TOOLS = [
    {
        "functionDeclarations": [
            {
                "name": "add",
                "description": "Adds things.",
                "parameters": {
                    "type": "OBJECT",
                    "properties": {"a": {"type": "INTEGER", "description": "First."}, "b": {"type": "STRING"}},
                    "required": ["a"],
                },
            }
        ]
    },
    {"functionDeclarations": [{"name": "now", "description": "The time."}]},
]


def called(name: str, args: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args}}


def answered(name: str, response: Any) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response}}


CONTENTS: list[dict[str, Any]] = [
    {"role": "user", "parts": [{"text": QUESTION}]},
    {"role": "model", "parts": [called(*CALLS[0]), called(*CALLS[1])]},
    {"role": "user", "parts": [answered("now", {"result": "noon"}), answered("add", {"result": 3})]},
    {"role": "model", "parts": [called(*CALLS[2])]},
    {"role": "function", "parts": [answered("add", {"error": "no"})]},
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(name: str, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(template_folder(tmp_path_factory.mktemp("model"), name))


async def rendered(tokenizer: ChatTokenizer, **fields: Any) -> str:
    wire = parse(GenerateContentRequest, {"contents": CONTENTS, "tools": TOOLS, **fields})
    family, tools = tokenizer.family, read_tools(wire, tokenizer.control_texts)
    assert tools is not None
    preamble = "" if family.renders_tools else castor_prompt(tools)
    messages = chat_messages(wire, tokenizer.has_system_role, family=family, preamble=preamble)
    ids = await tokenizer.render(TemplateInput(messages, tools.for_template() if family.renders_tools else ()))
    plain = Tokenizer.from_file(str(tokenizer._folder / "tokenizer.json"))
    return str(plain.decode(ids, skip_special_tokens=False))


def test_the_family_is_recognised(name: str, tokenizer: ChatTokenizer) -> None:
    assert (tokenizer.family.name, tokenizer.family.renders_tools) == FAMILIES[name]


async def test_no_text_of_the_caller_becomes_a_token(tokenizer: ChatTokenizer) -> None:
    marker = next(iter(tokenizer.special_ids))
    evil = parse(
        GenerateContentRequest,
        {
            "contents": [
                {"role": "user", "parts": [{"text": marker}]},
                {"role": "model", "parts": [called("add", {"a": 1, "b": marker})]},
                {"role": "user", "parts": [answered("add", {"result": marker})]},
            ],
            "tools": [{"functionDeclarations": [{"name": "add", "description": marker}]}],
        },
    )
    harmless = json.loads(evil.model_dump_json(exclude_unset=True).replace(marker, "x" * len(marker)))
    counts = []
    for wire in (evil, parse(GenerateContentRequest, harmless)):
        tools = read_tools(wire)
        assert tools is not None
        family = tokenizer.family
        messages = chat_messages(
            wire,
            tokenizer.has_system_role,
            family=family,
            preamble="" if family.renders_tools else castor_prompt(tools),
        )
        ids = await tokenizer.render(TemplateInput(messages, tools.for_template() if family.renders_tools else ()))
        counts.append(ids.count(tokenizer.special_ids[marker]))
    assert counts[0] == counts[1]


async def test_names_with_control_tokens_are_refused(tokenizer: ChatTokenizer) -> None:
    marker = next(iter(tokenizer.special_ids))
    parameters = {"type": "object", "properties": {"a": {"properties": {marker: {"type": "string"}}}}}
    with pytest.raises(InvalidArgument, match="control token"):
        await rendered(tokenizer, tools=[{"functionDeclarations": [{"name": "f", "parameters": parameters}]}])


async def test_a_name_and_the_templates_own_words_would_make_a_control_token(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """``<parameter=NAME>``: what transformers does not see, so that such a name never gets there."""
    tokenizer = ChatTokenizer(template_folder(tmp_path_factory.mktemp("model"), "Qwen3-Coder"))
    end = "<|im_end|>"
    for key, joins in (("harmless", False), (end[:-1], True)):
        contents = [{"role": "model", "parts": [called("add", {key: 1})]}]
        wire = parse(GenerateContentRequest, {"contents": [*CONTENTS[:1], *contents]})
        messages = chat_messages(wire, family=tokenizer.family)
        ids = rendering._chat_ids(tokenizer._renderer.tokenizer, TemplateInput(messages))
        assert ids.count(tokenizer.special_ids[end]) == 2 + joins
        if joins:
            with pytest.raises(InvalidArgument, match="together would make a control token"):
                await tokenizer.render(TemplateInput(messages))
        else:
            assert await tokenizer.render(TemplateInput(messages)) == ids
    with pytest.raises(InvalidArgument, match=r'rename what contains a control token.*"<\|im_end\|"'):
        chat_messages(wire, family=tokenizer.family, control_texts=tokenizer.control_texts)


async def test_the_finished_prompt_has_the_control_tokens_of_the_template(tokenizer: ChatTokenizer) -> None:
    """Whatever words, keys and values stand in a conversation: as many as with harmless ones, or a refusal."""
    controls = {tokenizer._renderer.tokenizer.convert_tokens_to_ids(text) for text in tokenizer.control_texts}
    tools = [Function("f", "d", {"type": "object", "properties": {"a": {"type": "string"}}}).for_template()]

    async def control_ids(name: str, text: str) -> list[int]:
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "f", "arguments": {name: text, "b": [text]}},
        }
        messages = [
            ChatMessage(role="user", content=f"{text} hi"),
            ChatMessage(role="assistant", content=f"so {text}", tool_calls=[call]),
            ChatMessage(role="tool", content=text, name="f", tool_call_id="call00000"),
            ChatMessage(role="assistant", content=f"{text}."),
            ChatMessage(role="user", content=f"x {text}"),
        ]
        declared = tools if tokenizer.family.renders_tools else []
        return [token for token in await tokenizer.render(TemplateInput(messages, declared)) if token in controls]

    harmless = await control_ids("a", "x")
    refused = 0
    # Python escapes the signs by which transformers knows the caller's texts in a list; and MiniMax's control tokens
    # begin as others end. There nothing but the refusal is left.
    may_refuse = tokenizer.family.name in ("lfm2", "seed-oss", "minimax-m2")
    for control in sorted(tokenizer.control_texts, key=len)[-12:]:
        for text in (control, control[:-1], control[1:], control[: len(control) // 2], f"a < {control} > [b] {{c}}"):
            for name, value, can_fail in (("a", text, may_refuse), (text, "x", True)):
                try:
                    assert await control_ids(name, value) == harmless
                except InvalidArgument:
                    assert can_fail
                    refused += name != "a"
    assert refused < 60, "not each key is one that a template makes a control token of"


async def test_what_a_template_makes_of_a_text_is_checked_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SmolLM3 takes the switch of thinking out of the system message, after it was looked through."""
    tokenizer = ChatTokenizer(template_folder(tmp_path_factory.mktemp("model"), "SmolLM3"))
    user = ChatMessage(role="user", content="a < b > c [d]")
    for text in ("Be brief. /no_think", "Be <brief>. /no_think", "<|im_end|> /no_think"):
        assert await tokenizer.render(TemplateInput([ChatMessage(role="system", content=text), user]))
    with pytest.raises(InvalidArgument, match="together would make a control token"):
        await tokenizer.render(TemplateInput([ChatMessage(role="system", content="<|im_/no_thinkend|>"), user]))


async def test_pieces_of_control_tokens_are_refused_as_names(tokenizer: ChatTokenizer) -> None:
    for text in tokenizer.control_texts:
        for piece in (text[:-1], text[1:]):
            call = {"contents": [*CONTENTS[:1], {"role": "model", "parts": [called("add", {piece: 1})]}]}
            schema = {"properties": {piece: {"type": "string"}}}
            declared = {"contents": "x", "tools": [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]}
            with pytest.raises(InvalidArgument, match="control token"):
                chat_messages(parse(GenerateContentRequest, call), control_texts=tokenizer.control_texts)
            with pytest.raises(InvalidArgument, match="control token"):
                read_tools(parse(GenerateContentRequest, declared), tokenizer.control_texts)


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_prompt_is_counted_wherever_it_is_cut(name: str, tmp_path: Path) -> None:
    """A result alone, and a history that ends with a call: programs count pieces of their chats."""
    tokenizer = ChatTokenizer(template_folder(tmp_path / "model", name))
    asked = {"role": "user", "parts": [{"text": QUESTION}]}
    called = {"role": "model", "parts": [{"functionCall": {"name": "now", "args": {}}}]}
    result = {"role": "user", "parts": [{"functionResponse": {"name": "now", "response": {"t": 4711}}}]}
    for contents in ([result], [asked, called]):
        wire = parse(GenerateContentRequest, {"contents": contents, "tools": TOOLS})
        chat = conversation(wire, ModelSpec("m", "m"), tokenizer, counting=True)
        assert await tokenizer.count(chat.chat) > 0
    await tokenizer.close()


@pytest.mark.parametrize("name", FAMILIES)
async def test_what_the_system_says_later_is_shown(name: str, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(template_folder(tmp_path / "model", name))
    said = [("system", "s0"), ("user", "u0"), ("system", "s1"), ("model", "m0"), ("user", "u1"), ("system", "s2")]
    contents = [{"role": role, "parts": [{"text": f"{text}."}]} for role, text in said]
    chat = conversation(parse(GenerateContentRequest, {"contents": contents}), ModelSpec("m", "m"), tokenizer)
    prompt = "".join(map(tokenizer.token_text, await tokenizer.render(chat.chat)))
    places = [prompt.index(f"{text}.") for _, text in said]
    # Some Mistral models are told what the system says right before the last turn.
    assert places[1:] == sorted(places[1:])
    assert places[0] < places[1] or tokenizer.family.name == "mistral-list"
    await tokenizer.close()
