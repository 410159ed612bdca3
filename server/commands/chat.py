"""``castor chat``: a conversation with a running server, through the same API as every other client.

On a terminal it reads turns until it is told to end. Where standard input is a file or a pipe, all of it is one
question, and only the answer goes to standard output.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.commands.chat_client import ChatError, Client, Json
from server.config.errors import ConfigError

HISTORY_LINES = 1000
PROMPT = "> "
MORE = "… "
BLOCK = '"""'
HELP = """\
/help            this list
/new             forget the conversation (also /clear)
/system [TEXT]   change the system instruction, or take it away
/file PATH       ask about a file with the next message
/stats           show counts and speed after each answer, or no longer
/exit            end (also /bye, /quit, Ctrl-D)
\"\"\"              begin a message of several lines, and end it
Ctrl-C           stop an answer; what has come of it stays in the conversation"""
ENDS = ("/exit", "/bye", "/quit")
CONTROLS = dict.fromkeys(set(range(32)) - {9, 10} | set(range(127, 160)))
"""What a model writes must not steer the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the command was called with."""

    url: str
    model: str | None = None
    api_key: str | None = None
    system: str | None = None
    files: tuple[Path, ...] = ()
    temperature: float | None = None
    stats: bool = False
    state_dir: Path


@dataclass(slots=True)
class Counts:
    """What is measured of one answer: times in seconds on the monotonic clock, and the server's counts of tokens."""

    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    usage: Json = field(default_factory=dict)

    def __str__(self) -> str:
        ended = time.monotonic()
        first = ended if self.first is None else self.first
        prompt, total = (self.usage.get(f"{name}TokenCount", 0) for name in ("prompt", "total"))
        answer = self.usage.get("candidatesTokenCount", 0) + self.usage.get("thoughtsTokenCount", 0)
        speed = f"{(answer - 1) / (ended - first):.1f} tokens/s, " if answer > 1 and ended > first else ""
        return (
            f"{speed}prompt {prompt}, answer {answer}, total {total} tokens, "
            f"first token after {first - self.asked:.2f} s"
        )


class Conversation:
    """The turns so far, and how the next answer is asked for and shown. ``plain`` shows the text of answers only."""

    def __init__(self, client: Client, model: Json, options: ChatOptions, *, plain: bool) -> None:
        self.model = str(model["name"]).removeprefix("models/")
        self.system = options.system
        self.stats = options.stats
        self._client = client
        self._plain = plain
        self._styled = not plain and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._contents: list[Json] = []
        self._files: list[Json] = []
        self._uploads: list[str] = []
        self._config: Json = {} if options.temperature is None else {"temperature": options.temperature}
        if model.get("thinking") and not plain:
            self._config["thinkingConfig"] = {"includeThoughts": True}
        for path in options.files:
            self.attach(path)

    def attach(self, path: Path) -> None:
        """Put a file into the next message. Raises ``ConfigError`` where the server cannot read it."""
        part = self._client.file_part(self.model, path.expanduser())
        self._files.append(part)
        if "fileData" in part:
            self._uploads.append(part["fileData"]["fileUri"])

    def forget(self) -> None:
        """Begin anew."""
        self._contents.clear()
        self._files.clear()

    def close(self) -> None:
        """Remove what was uploaded."""
        for uri in self._uploads:
            self._client.delete_file(uri)

    def ask(self, text: str) -> None:
        """Show the answer as it comes, and keep both turns. Ctrl-C ends it and keeps what has come.

        Raises ``ChatError``; nothing of the turn is kept then but its files, which go with the next one.
        """
        question = {"role": "user", "parts": [*self._files, {"text": text}]}
        body: Json = {"contents": [*self._contents, question], "generationConfig": self._config}
        if self.system:
            body["systemInstruction"] = {"parts": [{"text": self.system}]}
        counts, answer, reason, thinking = Counts(), "", "", False
        try:
            with closing(self._client.stream(self.model, body)) as chunks:
                for chunk in chunks:
                    counts.usage = chunk.usage or counts.usage
                    reason = chunk.reason or reason
                    for text, thought in chunk.texts:
                        counts.first = counts.first or time.monotonic()
                        self._show("\n" if thinking and not thought else "")
                        self._show(text, dim=thought)
                        answer += "" if thought else text
                        thinking = thought
        except KeyboardInterrupt:
            if self._plain:
                raise
            reason = "stopped"
        finally:
            self._show("" if counts.first is None else "\n")
        if reason != "STOP":
            self.remark("cut off at the limit of tokens" if reason == "MAX_TOKENS" else reason)
        if self.stats:
            self.remark(str(counts))
        if answer:
            self._contents += [question, {"role": "model", "parts": [{"text": answer}]}]
            self._files.clear()

    def _show(self, text: str, *, dim: bool = False) -> None:
        clean = text if self._plain else text.translate(CONTROLS)
        print(f"\033[2m{clean}\033[0m" if dim and self._styled and clean else clean, end="", flush=True)

    def remark(self, text: str) -> None:
        """A line that is not the model's."""
        if self._plain:
            print(f"[{text}]", file=sys.stderr)
        else:
            self._show(f"[{text}]", dim=True)
            self._show("\n")


def chat(options: ChatOptions) -> int:
    """Talk until standard input ends; returns the exit code. Raises ``ConfigError``."""
    os.umask(0o077)  # the history of a chat is for its user alone
    client = Client(options.url, options.api_key)
    model = client.model(options.model)
    interactive = sys.stdin.isatty()
    with closing(Conversation(client, model, options, plain=not interactive)) as conversation:
        if not interactive:
            return _answer_once(conversation)
        print(f"Talking to {conversation.model} at {client.url}. /help lists the commands, Ctrl-D ends.")
        with _history(options.state_dir / "chat_history") as remember:
            while (line := _message()) is not None:
                line = line.strip()
                if line:
                    remember(line)
                if not _obeyed(line, conversation):
                    return 0
    return 0


def _answer_once(conversation: Conversation) -> int:
    try:
        question = sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8 text; pass a file that is none with --file") from None
    if not question:
        raise ConfigError("standard input is empty: pipe a question into the command, or run it on a terminal")
    try:
        conversation.ask(question)
    except ChatError as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _obeyed(line: str, conversation: Conversation) -> bool:
    """Do what a message or a command asks for; False where it ends the chat. A command has one line."""
    command, _, rest = line.partition(" ") if "\n" not in line else ("", "", "")
    argument = rest.strip()
    try:
        if command in ENDS:
            return False
        if command == "/help":
            print(HELP)
        elif command in ("/new", "/clear"):
            conversation.forget()
            conversation.remark("a new conversation")
        elif command == "/system":
            conversation.system = argument or None
            conversation.remark("the system instruction is set" if argument else "there is no system instruction")
        elif command == "/stats":
            conversation.stats = not conversation.stats
            conversation.remark(f"counts are {'shown' if conversation.stats else 'hidden'}")
        elif command == "/file" and argument:
            conversation.attach(Path(argument))
            conversation.remark(f"{argument} goes with your next message")
        elif command.startswith("/"):
            conversation.remark(f"{command} is no command or lacks its argument; /help lists them")
        elif line:
            conversation.ask(line)
    except (ChatError, ConfigError) as error:
        conversation.remark(str(error))
    return True


def _message() -> str | None:
    """The next message, of several lines between two triple quotes or by pasting; None at the end of the input."""
    with suppress(EOFError):
        while True:
            try:
                line = input(PROMPT)
                if not line.lstrip().startswith(BLOCK):
                    return line
                lines = [line.lstrip().removeprefix(BLOCK)]
                while not lines[-1].rstrip().endswith(BLOCK):
                    lines.append(input(MORE))
                return "\n".join(lines).rstrip().removesuffix(BLOCK)
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit ends the chat)")
            except UnicodeDecodeError:
                print("(that was not UTF-8 text)")
    print()
    return None


@contextmanager
def _history(path: Path) -> Iterator[Any]:
    """Line editing with the messages of earlier chats, where this Python has it; yields what remembers a message."""
    try:
        import readline
    except ImportError:
        yield lambda _line: None
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_auto_history(False)
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield lambda line: readline.add_history(line.replace("\n", " "))
    finally:
        with suppress(OSError):  # a home that cannot be written to is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
