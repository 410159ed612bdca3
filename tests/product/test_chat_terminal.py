"""``castor chat`` as people use it: on a terminal and in a pipe, with the real server and the built-in model."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.product

SECONDS = 120.0
CTRL_C, CTRL_D = "\x03", "\x04"
_PATHS = os.pathsep.join(path for path in sys.path if path)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", "chat", *args]


def environment(state: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    return clean | {"PYTHONPATH": _PATHS, "CASTOR_STATE": str(state), "TERM": "xterm"}


class Terminal:
    """A pseudo-terminal with the command in it; ``shown`` is all that has come, without escape sequences."""

    def __init__(self, leader: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.shown = ""
        self._leader = leader
        self._raw = b""
        self._seen = 0

    def expect(self, text: str) -> str:
        """Wait for ``text`` after what was expected before; returns what stands between."""
        deadline = time.monotonic() + SECONDS
        while (place := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"{text!r} does not come after {self.shown[self._seen :]!r}"
            if select.select([self._leader], [], [], 0.1)[0]:
                self._raw += os.read(self._leader, 65536)
                plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._raw.decode(errors="replace"))
                self.shown = plain.replace("\r", "")
        between = self.shown[self._seen : place]
        self._seen = place + len(text)
        return between

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def end(self) -> int:
        """Type Ctrl-D; returns the exit code."""
        self.expect("> ")
        self.type(CTRL_D)
        return self.process.wait(SECONDS)


@contextmanager
def terminal(state: Path, *args: str) -> Iterator[Terminal]:
    leader, follower = pty.openpty()
    # The terminal becomes the session's own, so that Ctrl-C is a signal.
    become = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", become, *command(*args)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(state),
        start_new_session=True,
    )
    os.close(follower)
    try:
        yield Terminal(leader, process)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_a_conversation_on_a_terminal(castor: RunningServer, tmp_path: Path) -> None:
    with terminal(tmp_path, "--url", f"localhost:{castor.port}", "--stats", "--temperature", "0") as chat:
        chat.expect(f"Talking to smollm2-135m-instruct at http://localhost:{castor.port}.")
        chat.expect("> ")
        chat.type("What is the capital of France?\n")
        chat.expect("The capital of France is Paris.\n")
        assert re.fullmatch(
            r"\[[\d.]+ tokens/s, prompt 37, answer 7, total 44 tokens, first token after [\d.]+ s",
            chat.expect("]\n"),
        )
        chat.expect("> ")
        chat.type("And of Italy?\n")
        chat.expect("Rome")  # the model knows what was asked before
        chat.expect("first token")
        chat.expect("> ")
        chat.type('"""\n/one line\nand another"""\n')
        chat.expect("first token")
        chat.expect("> ")
        chat.type("\n   \n/new\n/nonsense\n")  # nothing is asked
        chat.expect("[a new conversation]")
        chat.expect("[/nonsense is no command")
        assert chat.end() == 0
    history = tmp_path / "chat_history"
    assert history.read_text().splitlines()[:2] == ["What is the capital of France?", "And of Italy?"]
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(castor: RunningServer, tmp_path: Path) -> None:
    with terminal(tmp_path, "--url", castor.url, "--temperature", "0") as chat:
        chat.expect("> ")
        chat.type("Write a very long story about a dragon and a princess.\n")
        chat.expect("princess.\n")
        chat.expect(" ")
        chat.type(CTRL_C)
        chat.expect("[stopped]\n")
        chat.expect("> ")
        chat.type(f"half a line{CTRL_C}")
        chat.expect("(Ctrl-D or /exit ends the chat)")
        chat.expect("> ")
        chat.type("What is the capital of France?\n")
        chat.expect("Paris")
        assert chat.end() == 0
    assert castor.metric("castor_requests_running") == 0


def test_a_file_and_a_system_instruction(castor: RunningServer, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Anna keeps the lighthouse of Skagen. The name of her dog is Rufus.\n")
    options = ["--url", castor.url, "--temperature", "0", "--file", str(notes)]
    with terminal(tmp_path, *options) as chat:
        chat.expect("> ")
        chat.type("What is the name of the dog?\n")
        chat.expect("Rufus")
        chat.expect("> ")
        chat.type(f"/file {tmp_path}/nowhere\n")
        chat.expect("nowhere: No such file or directory]")
        assert chat.end() == 0


def piped(castor: RunningServer, state: Path, text: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("--url", castor.url, *args),
        input=text,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment(state),
    )


def test_a_pipe_gets_the_answer_and_nothing_else(castor: RunningServer, tmp_path: Path) -> None:
    done = piped(castor, tmp_path, "What is the capital\nof France?", "--temperature", "0", "--stats")
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n")
    assert done.stderr.startswith("[")
    assert "answer 7" in done.stderr
    assert list(tmp_path.iterdir()) == [], "what is piped is not remembered"


def test_ten_starts_give_paris_ten_times(castor: RunningServer, tmp_path: Path) -> None:
    """Each with a seed of its own: nothing is set but by models.yaml."""
    answers = [piped(castor, tmp_path, "What is the capital of France?").stdout for _ in range(10)]
    assert [answer for answer in answers if "Paris" not in answer] == []


@pytest.mark.parametrize(
    ("text", "args", "said"),
    [
        ("", (), "standard input is empty"),
        ("hi", ("smollm2-135m-instuct",), "has no model 'smollm2-135m-instuct' (did you mean smollm2-135m-instruct?)"),
        ("hi", ("--temperature", "7"), "temperature"),
        ("hi", ("--file", "/nowhere"), "/nowhere: No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    castor: RunningServer, tmp_path: Path, text: str, args: tuple[str, ...], said: str
) -> None:
    done = piped(castor, tmp_path, text, *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("castor: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
