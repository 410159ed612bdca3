"""Whether the server speaks a chat template: what it renders, and whether it reads back what the template wrote.

Every check goes the way of a request: contents become messages, the template makes a prompt of them, and the turns of
the model in that prompt are read as its answers are.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.templates import folder_with
from tokenizers import Tokenizer

from engine.api.events import FinishReason
from server.config.models_file import ModelSpec
from server.convert.chat_tokenizer import ChatTokenizer
from server.convert.prompt import conversation
from server.convert.thinking import with_open_thought
from server.convert.tools import read_tools
from server.errors import InvalidArgument
from server.families.answer_syntax import AnswerSyntax
from server.families.family import Family
from server.families.tool_call_reader import ToolCall
from server.mapper.parts import PartsParser, Piece, Text, Thought
from server.wire.message import parse
from server.wire.requests import GenerateContentRequest

QUESTION = "How much is it?"
THOUGHTS = "I add first.\nThen I look."
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 1, "b": 'two <b> "2"\nlines, it\'s'}),
    ("now", {}),
    ("add", {"a": -7, "b": "é", "c": {"deep": [1, "x", True, None, {"y": 1.5}]}}),
]
_PROPERTIES = {
    "a": {"type": "INTEGER", "description": "First."},
    "b": {"type": "STRING"},
    "c": {"type": "OBJECT", "properties": {"deep": {"type": "ARRAY"}}},
}
TOOLS = [
    {
        "functionDeclarations": [
            {
                "name": "add",
                "description": "Adds things.",
                "parameters": {"type": "OBJECT", "properties": _PROPERTIES, "required": ["a"]},
            }
        ]
    },
    {"functionDeclarations": [{"name": "now", "description": "The time."}]},
]
RESULTS = [("now", {"result": "noon"}), ("add", {"result": 3}), ("add", {"error": "no"})]


@dataclass(frozen=True, slots=True)
class Report:
    """``problems`` are what the checks found."""

    family: Family
    problems: tuple[str, ...]

    def __str__(self) -> str:
        shown = "" if self.family.is_known else " (fallback)"
        if not self.family.renders_tools:
            shown += ", functions by Castor's prompt"
        if self.family.thought:
            shown += f", thinks ({', '.join(self.family.switches) or 'no switch'})"
        return f"{self.family.name}{shown}: {'; '.join(self.problems) or 'ok'}"


async def check(template: str, folder: Path) -> Report:
    """Check the text of a template; ``folder`` does not exist yet and takes a model that has its tokens."""
    tokenizer = ChatTokenizer(folder_with(folder, template))
    try:
        trial = _Trial(tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json")))
        return Report(tokenizer.family, tuple([problem async for problem in trial.problems()]))
    finally:
        await tokenizer.close()


def said(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "parts": list(parts)}


def called(name: str, args: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args}}


def answered(name: str, response: Any) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response}}


class _Trial:
    """The checks of one template."""

    def __init__(self, tokenizer: ChatTokenizer, plain: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain = plain
        self._family = tokenizer.family
        ends = {*map(tokenizer.token_text, tokenizer.end_ids), *self._family.end_tokens}
        self._ends = re.compile("|".join(map(re.escape, sorted(filter(None, ends)))) or r"\Z")

    async def problems(self) -> AsyncIterator[str]:
        checks = {
            "render": self._turns,
            "functions": self._functions,
            "calls": self._calls,
            "results": self._results,
            "thoughts": self._thoughts,
            "switch": self._switch,
        }
        for name, found in checks.items():
            try:
                problem = await found()
            except InvalidArgument as refusal:
                problem = str(refusal)
            if problem:
                yield f"{name}: {problem}"

    async def _turns(self) -> str:
        """Several turns of text, and the system's."""
        contents = [said("user", {"text": "u0."}), said("model", {"text": "m0."}), said("user", {"text": "u1."})]
        prompt = await self._prompt(contents, systemInstruction={"parts": [{"text": "s0."}]})
        places = [prompt.find(text) for text in ("u0.", "m0.", "u1.")]
        return "" if places == sorted(places) and places[0] >= 0 and "s0." in prompt else f"not all is in {prompt!r}"

    async def _functions(self) -> str:
        prompt = await self._prompt(_tool_loop(), tools=TOOLS)
        before, _, after = prompt.partition(QUESTION)
        missing = [text for text in ("add", "Adds things.", "now", "The time.") if text not in before + after]
        return f"{missing} are not shown" if missing else ""

    async def _calls(self) -> str:
        """The turns of the model, as its template writes them, are answers that the family's parser understands."""
        pieces = await self._read(await self._prompt(_tool_loop(), tools=TOOLS), replace(self._family, thought=None))
        found = [(piece.name, piece.args) for piece in pieces if isinstance(piece, ToolCall)]
        return "" if found == CALLS else f"read back as {found}"

    async def _results(self) -> str:
        """In the order of their calls."""
        history = (await self._prompt(_tool_loop(), tools=TOOLS)).partition(QUESTION)[2].replace("\\", "")
        places = [history.find(json.dumps(RESULTS[index][1])) for index in (1, 0, 2)]
        return "" if places == sorted(places) and places[0] >= 0 else "not in the order of their calls"

    async def _thoughts(self) -> str:
        """Those of earlier turns are left out or read back, and those of an answer are told from its text."""
        if self._family.thought is None:
            return ""
        signature = base64.b64encode(THOUGHTS.encode()).decode()
        call = {**called("now", {}), "thoughtSignature": signature}
        loop = [said("user", {"text": QUESTION}), said("model", {"text": "I look."}, call)]
        loop.append(said("user", answered(*RESULTS[0])))
        pieces = await self._read(await self._prompt(loop, tools=TOOLS), self._family)
        thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        # Where a template has one place for what comes before a call, the text is there too.
        if thoughts.strip() not in ("", THOUGHTS, f"{THOUGHTS}\nI look.") or THOUGHTS in text:
            return f"earlier ones are read back as {thoughts!r}, with the text {text!r}"
        begin, end = self._family.thought
        opened = await self._is_open([said("user", {"text": QUESTION})], tools=TOOLS)
        parser = PartsParser(AnswerSyntax(self._family, open_thought=opened))
        answer = f"{'' if opened else begin}Hm.{end}{self._family.answer_header}Yes."
        found = [*parser.feed(answer), *parser.flush(FinishReason.STOP)]
        return "" if found == [Thought("Hm."), Text("Yes.")] else f"an answer is read as {found}"

    async def _switch(self) -> str:
        """Without thinking the prompt differs, and leaves no thoughts open."""
        asked = [said("user", {"text": QUESTION})]
        off = {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}
        if not self._family.switches:
            return ""
        if await self._prompt(asked) == await self._prompt(asked, **off):
            return "the prompt is the same with and without thinking"
        return "thoughts are open without thinking" if await self._is_open(asked, **off) else ""

    async def _prompt(self, contents: list[dict[str, Any]], **fields: Any) -> str:
        wire = parse(GenerateContentRequest, {"contents": contents, **fields})
        chat = conversation(wire, ModelSpec("m", "m"), self._tokenizer, reopen=lambda signature: signature.decode())
        ids = await self._tokenizer.render(chat.chat)
        return str(self._plain.decode(ids, skip_special_tokens=False))

    async def _is_open(self, contents: list[dict[str, Any]], **fields: Any) -> bool:
        wire = parse(GenerateContentRequest, {"contents": contents, **fields})
        chat = conversation(wire, ModelSpec("m", "m"), self._tokenizer)
        thinking = with_open_thought(chat.thinking, await self._tokenizer.render(chat.chat), self._tokenizer)
        return thinking is not None and thinking.open

    async def _read(self, prompt: str, family: Family) -> list[Piece]:
        """What the turns after the question say, read as answers of ``family``."""
        asked = await self._prompt([said("user", {"text": QUESTION})], tools=TOOLS)
        head = self._ends.split(asked.partition(QUESTION)[2])[-1]
        history = prompt.partition(QUESTION)[2].removesuffix(head)
        if self._family.thought:
            head = head.partition(self._family.thought[0].strip())[0]
        tools = read_tools(parse(GenerateContentRequest, {"contents": "x", "tools": TOOLS}))
        syntax = AnswerSyntax(family, tools.for_template() if tools else ())
        pieces: list[Piece] = []
        for turn in self._ends.split(history):
            parser = PartsParser(syntax)
            spoken = turn.partition(head.strip())[2].lstrip("\n") if head.strip() and head.strip() in turn else turn
            pieces += [*parser.feed(spoken), *parser.flush(FinishReason.STOP)]
        return pieces


def _tool_loop() -> list[dict[str, Any]]:
    """Two calls at once, one more, and their results, the first two in the order in which they came."""
    return [
        said("user", {"text": QUESTION}),
        said("model", called(*CALLS[0]), called(*CALLS[1])),
        said("user", answered(*RESULTS[0]), answered(*RESULTS[1])),
        said("model", called(*CALLS[2])),
        said("function", answered(*RESULTS[2])),
    ]
