"""Sends spoilt requests to a server, each on a connection of its own, and judges what comes back."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httptools

from hostile_requests.made import Made, made

DOCUMENTED = frozenset({501, 503})
"""The statuses above 499 that a request may be answered with."""
UNPARSED = frozenset({"framing", "header", "path"})
"""After these the head itself may be no HTTP: the refusal has no body in the API's form."""
MAX_FAILURES = 50
"""This many are enough; a server that always fails would take all day."""


@dataclass(slots=True)
class Answer:
    """What came back; the status 0 is none at all."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    def on_message_begin(self) -> None:
        """Called by the parser: after a ``100 Continue`` once more, perhaps in the middle of what was read."""
        self.headers, self.body, self.whole = {}, b"", False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.body += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.whole = True

    @property
    def reached_the_engine(self) -> bool:
        return self.status == 200 and b'"candidates":[' in self.body


async def ask(port: int, content: bytes) -> Answer:
    """Send the bytes and read one answer, after a ``100 Continue`` if there is one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(content)
        if b"\r\n\r\n" not in content:
            # Of a head that is not complete there is nothing to answer: the server waits for the rest, as it should.
            writer.write_eof()
        answer = Answer()
        parser = httptools.HttpResponseParser(answer)
        while (not answer.whole or answer.status == 100) and (piece := await reader.read(65_536)):
            try:
                parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                answer.whole = True
            if answer.whole or answer.headers:
                answer.status = parser.get_status_code()
        if answer.status >= 200 and not {"content-length", "transfer-encoding"} & set(answer.headers):
            answer.whole = True  # the end of the connection ends such a body
        return Answer() if answer.status == 100 else answer
    except ConnectionError:
        return Answer()
    finally:
        writer.close()


def problem_of(sent: Made, answer: Answer) -> str:
    """What is wrong with an answer, whatever was sent; "" where nothing is."""
    if answer.status == 0:
        return "" if sent.kind == "framing" else "the connection ended without an answer"
    if not answer.whole:
        return "the answer broke off"
    if answer.status >= 500 and answer.status not in DOCUMENTED:
        return f"status {answer.status}: {answer.body[:300]!r}"
    kind = answer.headers.get("content-type", "").partition(";")[0]
    try:
        if kind == "text/event-stream":
            *events, last = answer.body.decode().split("\n\n")
            documents = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]
            if len(documents) < max(1, len(events)):
                return f"no stream of events: {answer.body[:300]!r}"
            if last:
                documents.append(json.loads(last))
            return "" if all("candidates" in document or "error" in document for document in documents) else "odd event"
        if kind == "application/json":
            document = json.loads(answer.body)
            if answer.status >= 400:
                error = document[-1]["error"] if isinstance(document, list) else document["error"]
                return "" if error["message"] and error["code"] else f"no error: {answer.body[:300]!r}"
            return ""
    except (ValueError, LookupError, TypeError):
        return f"not what {kind} promises: {answer.body[:300]!r}"
    return "" if answer.status < 400 or sent.kind in UNPARSED else f"{answer.status} as {kind}: {answer.body[:100]!r}"


@dataclass(slots=True)
class Findings:
    """What came back so far, by kind of mutation."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def seen(self, sent: Made, answer: Answer) -> None:
        """Count and judge an answer."""
        self.statuses.setdefault(sent.kind, Counter())[answer.status] += 1
        self.reached[sent.kind] += answer.reached_the_engine
        if problem := problem_of(sent, answer):
            self.failures.append(f"{sent}: {problem}")


async def send(port: int, seed: int, numbers: list[int], *, at_once: int, seconds: float) -> Findings:
    """Send these requests of a seed; ``seconds`` is the longest that one may take."""
    findings = Findings()
    left = iter(numbers)

    async def work() -> None:
        for number in left:
            if len(findings.failures) >= MAX_FAILURES:
                return
            sent = made(seed, number)
            try:
                findings.seen(sent, await asyncio.wait_for(ask(port, sent.content), seconds))
            except TimeoutError:
                findings.failures.append(f"{sent}: no answer within {seconds:g} s")

    await asyncio.gather(*(work() for _ in range(at_once)))
    return findings


def table(findings: Findings) -> Iterator[str]:
    """The findings as lines: a row for each kind of mutation, a column for each status, and the sums."""
    columns = sorted({status for row in findings.statuses.values() for status in row})
    names = ["closed" if status == 0 else str(status) for status in columns]
    yield f"{'mutation':12}" + "".join(f"{name:>8}" for name in [*names, "all", "engine"])
    rows = sorted(findings.statuses.items())
    total: Counter[int] = sum(findings.statuses.values(), Counter())
    for name, row in [*rows, ("all", total)]:
        reached = findings.reached.total() if name == "all" else findings.reached[name]
        yield f"{name:12}" + "".join(f"{row[status]:8}" for status in columns) + f"{row.total():8}{reached:8}"
