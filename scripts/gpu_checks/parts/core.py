"""The engine's core in this process, with its scheduler, under load: many clients at once, one long arrival, and one
answer that follows a grammar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from engine.api.engine import EngineConfig
from engine.api.events import ErrorKind, RequestEvents
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.constraints.contracts import Grammars
from engine.core.core import Core
from engine.platforms.recipe import platform_of
from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.machine import SPELLS
from gpu_checks.models import Made, problem_of, random_tokens
from gpu_checks.tokens import EOS, make_tokenizer

PART = "core"


@dataclass(frozen=True, slots=True)
class Load:
    """Clients with tokens of prompt and answer; then decodes with prompts of a length, and a long prompt that
    arrives; then a window of steps of as many answers as clients."""

    clients: int
    prompt: int
    answer: int
    decodes: int
    stream: int
    arrival: int
    steps_before: int
    window: int


REAL = Load(64, 1024, 128, 8, 64, 4000, 60, 40)
TINY = Load(2, 5, 2, 1, 3, 20, 2, 2)
# The model, and whether the goals apply to it.
MODELS = (("Llama-3.1-8B", True), ("Qwen3-0.6B", False))
# A grammar whose answers are longer than any context.
STRINGS = {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 10_000}
LONG_LIST = json.dumps({"grammars": [{"json_schema": STRINGS}]})


@dataclass
class Clients:
    """Submits to a core, steps it, and records when tokens came."""

    core: Core
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        if self.core.info.device != "cpu":  # as the engine's process does
            self.core.stream_during_forward(self._note)

    def submit(self, name: str, prompt: list[int], answer: int, grammar: str | None = None) -> None:
        """Ask for an answer of that many tokens, chosen greedily."""
        self.times[name] = []
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, grammar=grammar)
        self.core.submit(Request(name, tuple(prompt), sampling))

    def step_while(self, wanted: Callable[[], bool]) -> None:
        """Step as long as there is work and ``wanted`` holds."""
        while self.core.has_work and wanted():
            self.steps += 1
            self._note(self.core.step())

    def end(self, names: Iterable[str]) -> None:
        """Cancel those that are still running."""
        for name in names:
            self.core.cancel(name)
        self.step_while(lambda: True)

    def _note(self, events: list[RequestEvents]) -> None:
        now = time.perf_counter()
        for event in events:
            for delta in event.deltas:
                self.times[event.request_id] += [now] * len(delta.token_ids)
            error = event.done.error if event.done is not None else None
            if error is not None and error.kind is not ErrorKind.CANCELLED:
                self.errors.append(error.message)


def run(check: Check) -> None:
    """All loads on both models."""
    load = TINY if check.machine.smoke else REAL
    for name, has_goals in MODELS[:1] if check.machine.smoke else MODELS:  # in a smoke run both are the same
        if not check.has_time(PART, name, 20.0):
            return
        made = check.models.get(name)
        if problem := problem_of(check.machine, made.runner):
            check.report.failed(PART, name, problem)
            continue
        tokenizer = make_tokenizer(made.runner.info.vocab_size)
        start = partial(_start, made, tokenizer)
        _many_clients(check, made, start, load)
        _arrival(check, made, start, load, has_goals)
        _beside_a_grammar(check, made, tokenizer, load, has_goals)


def _start(made: Made, tokenizer: Tokenizer, grammars: Grammars | None = None) -> Clients:
    runner = made.runner
    config = EngineConfig(path="", max_running=runner.info.max_running)
    cost = platform_of(torch.device(runner.info.device)).step_cost(runner)
    return Clients(Core(runner, made.sampler, tokenizer, config, cost=cost, ahead=True, grammars=grammars))


def _many_clients(check: Check, made: Made, start: Callable[[], Clients], load: Load) -> None:
    """All clients at once: tokens per second, time to the first token, gaps between the others."""
    name = f"{made.name}, {load.clients} clients, {load.prompt}/{load.answer} tokens"
    if not check.has_time(PART, name, 5.0):
        return
    # One core for all rounds, as in a server: after a short first round its pacer knows what steps cost.
    clients, kept = start(), check.budget.left / 2
    _round(clients, made, load, 0, max(1, load.clients // 8))
    rounds: list[dict[str, float]] = []
    while len(rounds) < SPELLS and (not rounds or check.budget.left - rounds[-1]["seconds"] > kept):
        rounds.append(_round(clients, made, load, 1 + len(rounds), load.clients))
    clients.core.close()
    if clients.errors:
        check.report.failed(PART, name, clients.errors[0])
    else:
        usual = sorted(rounds, key=lambda found: found["tok_s"])[len(rounds) // 2]
        note = (
            f"{usual['steps']:.0f} steps; first token after {usual['first_p50']:.2f} s, then every "
            f"{usual['gap_p50'] * 1e3:.1f} ms, p99 {usual['gap_p99'] * 1e3:.1f}; median of {len(rounds)}"
        )
        check.report.number(PART, name, usual["tok_s"], "tok/s", note, rounds)


def _round(clients: Clients, made: Made, load: Load, number: int, count: int) -> dict[str, float]:
    vocab_size, before = made.runner.info.vocab_size, clients.steps
    names = [f"{number}.{client}" for client in range(count)]
    prompts = [random_tokens(number * 1000 + n, load.prompt, vocab_size) for n in range(count)]
    began = time.perf_counter()
    for name, prompt in zip(names, prompts, strict=True):
        clients.submit(name, prompt, load.answer)
    clients.step_while(lambda: True)
    seconds = time.perf_counter() - began
    times = [clients.times[name] for name in names]
    gaps = [later - earlier for of_one in times for earlier, later in pairwise(of_one)]
    return {
        "seconds": seconds,
        "tok_s": sum(map(len, times)) / seconds,
        "steps": clients.steps - before,
        "first_p50": median(of_one[0] - began for of_one in times if of_one) if any(times) else 0.0,
        "gap_p50": median(gaps) if gaps else 0.0,
        "gap_p99": quantiles(gaps, n=100)[-1] if len(gaps) > 1 else 0.0,
    }


def _arrival(check: Check, made: Made, start: Callable[[], Clients], load: Load, has_goals: bool) -> None:
    """How a long prompt affects running answers, and how long it waits itself."""
    name = f"{made.name}, {load.decodes} decodes and one prompt of {load.arrival:,} tokens"
    if not check.has_time(PART, name, 3.0):
        return
    info, clients = made.runner.info, start()
    streams = [f"stream {number}" for number in range(load.decodes)]
    for number, stream in enumerate(streams):
        prompt = random_tokens(9000 + number, load.stream, info.vocab_size)
        clients.submit(stream, prompt, info.max_context - load.stream)
    found = []
    for number in range(SPELLS + 1):  # the pacer learns from the first
        prompt = random_tokens(9100 + number, load.arrival, info.vocab_size)
        if (arrival := _one_arrival(clients, streams, f"long {number}", prompt, load.steps_before)) is not None:
            found.append(arrival)
    clients.end(streams)
    clients.core.close()
    if clients.errors or len(found) <= SPELLS:
        check.report.failed(PART, name, next(iter(clients.errors), "no first token came"))
        return
    usual = sorted(found[1:])[SPELLS // 2]
    note = (
        f"{usual.steps} steps; tokens of others every {usual.alone * 1e3:.1f} ms alone, {usual.beside * 1e3:.1f} ms "
        f"beside it, at most {usual.worst * 1e3:.1f}"
    )
    data = [{**arrival._asdict(), "beside": arrival.beside} for arrival in found]
    check.report.number(PART, name, usual.waited, "s to its first token", note, data)
    if has_goals:
        check.report.share(goals.ARRIVAL, usual.worst / usual.alone)


class _Arrival(NamedTuple):
    """Seconds until the first token of a long prompt and steps until then; the others' usual gap, and the worst."""

    waited: float
    steps: int
    alone: float
    worst: float

    @property
    def beside(self) -> float:
        """Seconds between the others' tokens meanwhile: each step gives them one."""
        return self.waited / self.steps


def _one_arrival(
    clients: Clients, streams: list[str], name: str, prompt: list[int], steps_before: int
) -> _Arrival | None:
    clients.step_while(lambda: any(not clients.times[stream] for stream in streams))
    quiet, steps = time.perf_counter(), clients.steps
    clients.step_while(lambda: clients.steps < steps + steps_before)
    arrived, steps = time.perf_counter(), clients.steps
    clients.submit(name, prompt, 1)
    clients.step_while(lambda: not clients.times[name])
    if not clients.times[name]:
        return None
    waited, steps_until = clients.times[name][0] - arrived, clients.steps - steps
    # The others' tokens of the last of these steps may be reported in the next one.
    clients.step_while(lambda: clients.steps < steps + steps_until + 2)
    before, beside = _pauses(clients, streams, quiet, arrived), _pauses(clients, streams, arrived, math.inf)
    return _Arrival(waited, steps_until, median(before), max(beside))


def _pauses(clients: Clients, streams: list[str], since: float, until: float) -> list[float]:
    """The gaps of all streams that end within the interval."""
    pairs = [pair for stream in streams for pair in pairwise(clients.times[stream])]
    return [later - earlier for earlier, later in pairs if since < later <= until]


def _beside_a_grammar(check: Check, made: Made, tokenizer: Tokenizer, load: Load, has_goals: bool) -> None:
    """What one answer that follows a grammar costs the others: their pace beside it, and beside a free one instead."""
    others = [f"other {number}" for number in range(load.clients - 1)]
    name = f"{made.name}, {len(others)} free answers beside one with a grammar"
    if not check.has_time(PART, name, 8.0):
        return
    try:
        from engine.constraints.grammar import GrammarBuilder
    except ImportError as error:
        check.report.skipped(PART, name, f"not installed: {error}")
        return
    end = tokenizer.token_to_id(EOS)
    assert end is not None, "it is a token of each tokenizer here"
    grammars = GrammarBuilder(tokenizer, made.runner.info.vocab_size, (end,))
    clients = _start(made, tokenizer, grammars)
    rounds = [
        [_window(clients, made, load, others, grammar) for grammar in (None, LONG_LIST)]
        for _ in range(SPELLS + 1)  # the pacer learns from the first
    ]
    clients.core.close()
    alone, beside = (median(window.pace for window in windows) for windows in zip(*rounds[1:], strict=True))
    if clients.errors or not all(window.joined for _, window in rounds):
        check.report.failed(PART, name, next(iter(clients.errors), "the one with a grammar got no token"))
        return
    note = (
        f"{alone:,.0f} beside a free one; the one with a grammar took part in {rounds[-1][1].joined} of {load.window} "
        "steps"
    )
    data = [{"free": free._asdict(), "grammar": following._asdict()} for free, following in rounds]
    check.report.number(PART, name, beside, "tok/s", note, data)
    if has_goals:
        check.report.share(goals.GRAMMAR, beside / alone)


class _Window(NamedTuple):
    """Some steps of many answers: tokens per second of all but one, and the tokens of that one."""

    pace: float
    joined: int


def _window(clients: Clients, made: Made, load: Load, others: list[str], grammar: str | None) -> _Window:
    """All answers begin anew, so that their lengths are the same in each window."""
    info, times = made.runner.info, clients.times

    def submit(name: str, number: int, grammar: str | None = None) -> None:
        prompt = random_tokens(9200 + number, load.stream, info.vocab_size)
        clients.submit(name, prompt, info.max_context - load.stream, grammar)

    submit("one", len(others), grammar)
    clients.step_while(lambda: not times["one"])  # the others begin when its grammar is compiled
    for number, name in enumerate(others):
        submit(name, number)
    clients.step_while(lambda: not all(times[name] for name in others))
    joined, tokens = len(times["one"]), sum(len(times[name]) for name in others)
    began, steps = time.perf_counter(), clients.steps
    clients.step_while(lambda: clients.steps < steps + load.window)
    seconds = time.perf_counter() - began
    window = _Window((sum(len(times[name]) for name in others) - tokens) / seconds, len(times["one"]) - joined)
    clients.end(["one", *others])
    return window
