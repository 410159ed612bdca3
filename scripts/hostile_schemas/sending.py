"""Sends numbered inputs to a server, several at a time, and judges each answer and the server meanwhile."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from hostile_schemas.bodies import Body, body

EXPECTED = frozenset({200, 400, 429})
HEALTH_EVERY_SECONDS = 0.2
MAX_FAILURES = 50
"""This many are enough; a server that always fails would take all day."""


class Stopped(Exception):
    """The run cannot continue; the message says why."""


@dataclass(slots=True)
class Findings:
    """The findings so far. Times in seconds; ``outcomes`` by status and class of message, ``kinds`` by kind of
    schema and whether it was answered, ``under_way`` the inputs without an answer."""

    failures: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "none")
    slowest_health: float = 0.0
    longest_refusal: tuple[int, str] = (0, "none")
    under_way: dict[int, Body] = field(default_factory=dict)

    def failed(self, why: str) -> None:
        """Record a failure. Raises ``Stopped`` after too many."""
        self.failures.append(why)
        if len(self.failures) >= MAX_FAILURES:
            raise Stopped(f"{MAX_FAILURES} inputs failed")

    def seen(self, sent: Body, answer: httpx.Response, seconds: float) -> None:
        """Judge an answer."""
        words = "answered" if answer.status_code == 200 else "refused"
        self.kinds.setdefault(sent.kind, Counter())[words] += 1
        self.outcomes[f"{answer.status_code} {message_class(answer)}"] += 1
        self.slowest = max(self.slowest, (seconds, str(sent)))
        if words == "refused":
            self.longest_refusal = max(self.longest_refusal, (len(answer.content), str(sent)))
        problem = problem_of(answer)
        if problem:
            self.failed(f"{sent}: {problem}")


def problem_of(answer: httpx.Response) -> str:
    """What is wrong with an answer, whatever the input; "" where nothing is."""
    if answer.status_code not in EXPECTED:
        return f"status {answer.status_code}: {answer.text[:300]}"
    try:
        said = answer.json()
        if answer.status_code == 200:
            return "" if said["candidates"][0]["finishReason"] else "no reason why the answer ends"
        error = said["error"]
        whole = error["code"] == answer.status_code and error["status"] and error["message"]
    except (ValueError, LookupError, TypeError):
        whole = False
    return "" if whole else f"no answer in the API's form: {answer.text[:300]}"


def message_class(answer: httpx.Response) -> str:
    """The message of a refusal without what came from the request: paths, quoted texts and numbers."""
    if answer.status_code == 200:
        return ""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return "no message"
    line = message.splitlines()[0]
    line = re.sub(r"^\* |GenerateContentRequest\.", "", line)
    line = re.sub(r"(?:tools|generation_config|parameters)\S*(?: \S+)*?: ", "", line, count=1)
    line = re.sub(r"""'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?""", "'…'", line)
    return re.sub(r"\d[\d.e+-]*", "N", line)[:90]


class Sender:
    """Sends the inputs ``numbers`` of a seed to one model of the server at ``url``, ``at_once`` at a time.

    ``seconds`` is how long each may take, from when it is sent, and how long /healthz may take.
    """

    def __init__(self, url: str, model: str, seed: int, at_once: int, seconds: float) -> None:
        self.findings = Findings()
        self._url = url
        self._path = f"/v1beta/models/{model}:generateContent"
        self._seed = seed
        self._at_once = at_once
        self._seconds = seconds

    async def send(self, numbers: Iterator[int]) -> None:
        """Send all of them. Raises ``Stopped`` where the server stops answering, or too much is wrong."""
        limits = httpx.Limits(max_connections=self._at_once, max_keepalive_connections=self._at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=self._seconds, limits=limits) as client:
            health = asyncio.create_task(self._poll_health())
            workers = [asyncio.create_task(self._work(client, numbers)) for _ in range(self._at_once)]
            left = {health, *workers}
            try:
                while left > {health}:
                    done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            finally:
                for task in (health, *workers):
                    task.cancel()
                await asyncio.gather(health, *workers, return_exceptions=True)

    async def _work(self, client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            sent = await asyncio.to_thread(body, self._seed, number)
            self.findings.under_way[number] = sent
            began = time.monotonic()
            try:
                # Not the client's timeouts: they are for each piece of an answer.
                async with asyncio.timeout(self._seconds):
                    answer = await client.post(self._path, content=sent.content)
            except (TimeoutError, httpx.TimeoutException):
                self.findings.failed(f"{sent}: no answer within {self._seconds:g} s")
            except httpx.TransportError as error:
                self.findings.failed(f"{sent}: the connection broke ({error!r})")
            else:
                self.findings.seen(sent, answer, time.monotonic() - began)
            del self.findings.under_way[number]

    async def _poll_health(self) -> None:
        """Ask /healthz on a connection of its own. Raises ``Stopped`` when it does not answer."""
        async with httpx.AsyncClient(base_url=self._url, timeout=self._seconds) as client:
            while True:
                began = time.monotonic()
                try:
                    answer = await client.get("/healthz")
                except httpx.TransportError as error:
                    raise Stopped(f"/healthz does not answer within {self._seconds:g} s ({error!r})") from None
                if answer.status_code != 200:
                    raise Stopped(f"/healthz answers {answer.status_code}")
                self.findings.slowest_health = max(self.findings.slowest_health, time.monotonic() - began)
                await asyncio.sleep(HEALTH_EVERY_SECONDS)


def summary(findings: Findings) -> Iterator[str]:
    """The findings as lines."""
    yield "answered and refused, by kind of schema:"
    for kind, counted in sorted(findings.kinds.items()):
        yield f"  {kind}: {counted['answered']} and {counted['refused']}"
    yield "answers, by status and class of message:"
    for outcome, times in findings.outcomes.most_common():
        yield f"  {times:6} {outcome}"
    seconds, slowest = findings.slowest
    yield f"slowest: {seconds:.2f} s, {slowest}; /healthz took {findings.slowest_health * 1000:.0f} ms at most"
    size, longest = findings.longest_refusal
    yield f"longest refusal: {size} bytes, {longest}"
    if findings.under_way:
        yield f"without an answer at the end: {'; '.join(map(str, findings.under_way.values()))}"
    for failure in findings.failures:
        yield f"FAILED {failure}"
