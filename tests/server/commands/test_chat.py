"""What a conversation keeps and shows, and what is typed at it; test_chat_terminal.py tries it on a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.raw_server import chunked, json_answer, raw_server

from server.commands import chat as chat_module
from server.commands.chat import ChatOptions, Conversation, chat
from server.commands.chat_client import INCOMPLETE, ChatError, Client
from server.config.errors import ConfigError

MODEL = {"name": "models/tiny", "thinking": True}


def answer(*parts: dict[str, Any], complete: bool = True) -> bytes:
    """A stream of one event, with the end of the answer or without."""
    candidate: dict[str, Any] = {"content": {"parts": list(parts)}}
    if complete:
        candidate["finishReason"] = "STOP"
    return chunked(b"data: " + json.dumps({"candidates": [candidate]}).encode() + b"\n\n", complete=complete)


@contextmanager
def talking(*answers: bytes, **options: Any) -> Iterator[tuple[Conversation, Callable[[], list[Any]]]]:
    """A conversation with a server that gives these answers, and the bodies that it has sent."""
    with raw_server(*answers) as (url, requests):
        given = ChatOptions(url=url, state_dir=Path(), **options)
        conversation = Conversation(Client(url, None), MODEL, given, plain=False)
        yield conversation, lambda: [json.loads(request.partition(b"\r\n\r\n")[2]) for request in requests]


def turns(body: Any) -> list[tuple[str, str]]:
    return [(content["role"], content["parts"][-1]["text"]) for content in body["contents"]]


def test_thoughts_are_shown_and_not_sent_back(capsys: pytest.CaptureFixture[str]) -> None:
    thought = answer({"text": "Hm.", "thought": True}, {"text": "Yes"}, {"text": "!"})
    with talking(thought, system="Be brief.", temperature=0.5) as (conversation, sent):
        conversation.ask("Well?")
        conversation.ask("Really?")
        first, second = sent()
    assert capsys.readouterr().out == "Hm.\nYes!\n" * 2
    assert turns(second) == [("user", "Well?"), ("model", "Yes!"), ("user", "Really?")]
    assert first["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert first["generationConfig"] == {"temperature": 0.5, "thinkingConfig": {"includeThoughts": True}}


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(answer({"text": "a\x1b[2Jb\x07\x9b\tc\r\n"})) as (conversation, _):
        conversation.ask("Well?")
    assert capsys.readouterr().out == "a[2Jb\tc\n\n"


def test_a_turn_that_fails_is_not_part_of_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = json_answer(
        {"error": {"code": 400, "message": "too long", "status": "INVALID_ARGUMENT"}}, "400 Bad Request"
    )
    with talking(refusal, answer({"text": "Par"}, complete=False), answer({"text": "Rome"})) as (conversation, sent):
        with pytest.raises(ChatError, match="too long"):
            conversation.ask("one")
        with pytest.raises(ChatError, match=f"^{INCOMPLETE}$"):
            conversation.ask("two")
        conversation.ask("three")
        assert turns(sent()[-1]) == [("user", "three")]
    assert capsys.readouterr().out == "Par\nRome\n"


def test_what_has_come_of_a_stopped_answer_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(answer({"text": "Once"}, {"text": "upon"}), answer({"text": "a"})) as (conversation, sent):
        shown = conversation._show

        def interrupted(text: str, *, dim: bool = False) -> None:
            if text == "upon":
                raise KeyboardInterrupt
            shown(text, dim=dim)

        monkeypatch.setattr(conversation, "_show", interrupted)
        conversation.ask("A story!")
        conversation.ask("Go on.")
        assert turns(sent()[-1]) == [("user", "A story!"), ("model", "Once"), ("user", "Go on.")]
    assert capsys.readouterr().out == "Once\n[stopped]\na\n"


def test_a_file_goes_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    counted = json_answer({"totalTokens": 1})
    with talking(counted, answer({"text": "ok"}), files=(tmp_path / "a.txt",)) as (conversation, sent):
        conversation.ask("What is it?")
        conversation.ask("Sure?")
        last = sent()[-1]["contents"]
    assert [len(content["parts"]) for content in last] == [2, 1, 1]
    assert last[0]["parts"][0]["inlineData"]["data"] == "QQ=="


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with talking(answer({"text": "ok"})) as (conversation, sent):
        typed = [
            "hi",
            "/system You are a cat.",
            "hi again",
            "/new",
            "/system",
            "/file",
            "/stats",
            "/1\nis text",
            "/help",
            "",
        ]
        assert all(chat_module._obeyed(line, conversation) for line in typed)
        assert not any(chat_module._obeyed(line, conversation) for line in ("/exit", "/bye", "/quit now"))
        bodies = sent()
    assert [turns(body)[-1][1] for body in bodies] == ["hi", "hi again", "/1\nis text"]
    assert ["systemInstruction" in body for body in bodies] == [False, True, False]
    assert [len(body["contents"]) for body in bodies] == [1, 3, 1]
    said = capsys.readouterr().out
    assert "[/file is no command or lacks its argument; /help lists them]" in said
    assert "first token after" in said
    assert chat_module.HELP in said


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (None, 0)])
def test_the_exit_code_of_a_pipe(
    end: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" Why?\n"))
    if end is not None:
        monkeypatch.setattr(Client, "stream", lambda *_: (_ for _ in ()).throw(end))
    with raw_server(json_answer({"models": [MODEL]}), answer({"text": "So."})) as (url, _):
        assert chat(ChatOptions(url=url, state_dir=Path())) == code
    assert capsys.readouterr().out == ("" if end else "So.\n")


def test_a_failure_in_a_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?"))
    answers = json_answer({"models": [MODEL]}), answer({"text": "So"}, complete=False)
    with raw_server(*answers) as (url, _), pytest.raises(ConfigError, match=f"^{INCOMPLETE}$"):
        chat(ChatOptions(url=url, state_dir=Path()))
    assert capsys.readouterr().out == "So\n"
