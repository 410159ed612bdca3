"""How fast an 8B model decodes, greedy and sampled, and where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.sequence import ScheduledChunk, Sequence
from gpu_checks import goals
from gpu_checks.check import Check
from gpu_checks.machine import SPELLS, Machine
from gpu_checks.models import GREEDY, Made, Pages, problem_of, random_tokens

PART = "decode"
SAMPLED = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.95, seed=1)
GOALS = {
    1: (goals.DECODE_1, goals.SAMPLED_1),
    64: (goals.DECODE_64, goals.SAMPLED_64),
    256: (goals.DECODE_256, goals.SAMPLED_256),
}
# Operators and kernels in the table of the profiler.
_ROWS = 25


@dataclass(frozen=True, slots=True)
class Load:
    """Concurrent sequences, tokens of prompt, prompts in a step of prefill, steps of a spell and of the profile."""

    batches: tuple[int, ...]
    prompt: int
    together: int
    steps: int
    profiled: int
    ragged: tuple[int, int, int] = (32_768, 63, 200)

    @property
    def room(self) -> int:
        """Tokens that a sequence may reach: the spells of greedy and sampled decoding, warm-ups and the profiles."""
        return self.prompt + (1 + len(self.batches)) * (2 * (SPELLS + 1) * self.steps + self.profiled + 2)


REAL = Load((256, 64, 8, 1), 1024, 4, 12, 5)
TINY = Load((2, 1), 5, 1, 1, 1, (24, 1, 5))


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of a step: in all, and on the device for forward and for sampling; the host takes the rest.

    Device times begin with the first launch, so time in which the device waits for the host is included. ``redrawn`` is
    the share of tokens that the device had wrong.
    """

    step: float
    forward: float
    sample: float
    redrawn: float

    @property
    def host(self) -> float:
        return self.step - self.forward - self.sample


def run(check: Check) -> None:
    """Prefill once, then spells of decodes of fewer and fewer sequences."""
    load = TINY if check.machine.smoke else REAL
    if not check.has_time(PART, "Llama-3.1-8B", 15.0):
        return
    ceilings = check.ceilings  # before the KV cache takes the memory that this needs
    made = check.models.get("Llama-3.1-8B")
    problem = problem_of(check.machine, made.runner)
    for kind, only_decodes in {"decode steps": True, "steps with prefill": False}.items():
        recorded = any(shape.only_decodes == only_decodes for shape in made.runner.recorded_shapes)
        check.report.checked(PART, f"{kind} are recorded", recorded and not problem, problem)
    pages = Pages(made.runner)
    most = next((batch for batch in load.batches if pages.holds(batch, load.room)), None)
    if most is None:
        check.report.failed(PART, made.name, f"the cache holds {made.runner.info.groups[0].num_blocks} blocks")
        return
    vocab_size = made.runner.info.vocab_size
    sequences = [pages.sequence(random_tokens(n, load.prompt, vocab_size), load.room) for n in range(most)]
    _prefill(check, made, sequences, load, ceilings.matmul)
    for batch in load.batches:
        if batch > most:
            check.report.skipped(PART, f"{batch} sequences", "the cache is too small")
        else:
            _measure(check, made, sequences[:batch], load)
    together, stepper = sequences[: min(64, most)], _Stepper(made)
    decode = partial(stepper.step, together, lambda _: 1)
    _profile(check, f"{len(together)} sequences, sampled", decode, load)
    stepper.read()
    _mixed(check, made, sequences[: min(8, most - 1)], pages, load)
    _ragged(check, made, load)
    _recorded(check, made.runner)


def _prefill(check: Check, made: Made, sequences: list[Sequence], load: Load, matmul: float) -> None:
    """Steps as large as the scheduler makes them, the first for warm-up."""
    name, seconds, together = f"prefill of {load.together} × {load.prompt:,} tokens", [], load.together
    for begin in range(0, len(sequences), together):
        check.report.doing(f"{PART}: {name}, {begin} done")
        chunk = sequences[begin : begin + together]
        seconds.append(check.machine.seconds(partial(_Stepper(made).step_and_read, chunk, len)))
    usual, tokens = median(seconds[1:] or seconds), together * load.prompt
    check.report.number(PART, name, tokens / usual, "tok/s", f"{usual * 1e3:.1f} ms, median of {len(seconds) - 1}")
    # The embedding is only looked up, and the head computes only the last token.
    check.report.share(goals.PREFILL, 2 * made.layer_parameters * tokens / usual / matmul)


def _measure(check: Check, made: Made, sequences: list[Sequence], load: Load) -> None:
    """Measure one batch size, greedy and sampled."""
    batch, found = len(sequences), dict[str, Split]()
    for way, sampling in {"greedy": GREEDY, "sampled": SAMPLED}.items():
        name = f"{batch} sequences, {way}"
        if not check.has_time(PART, name, 2.0):
            return
        for sequence in sequences:
            sequence.request = Request("check", sequence.request.prompt, sampling)
        split = found[way] = _spells(check.machine, made, sequences, load.steps)
        note = ", ".join(
            f"{part} {seconds * 1e3:.2f}"
            for part, seconds in (
                ("step", split.step),
                ("forward", split.forward),
                ("sample", split.sample),
                ("host", split.host),
            )
        )
        check.report.number(PART, name, batch / split.step, "tok/s", f"ms: {note}; redrawn {split.redrawn:.3f}")
    if batch not in GOALS:
        return
    read, of_greedy = GOALS[batch]
    if goals.STEP_64.card in check.machine.name and batch == 64:
        check.report.share(goals.STEP_64, found["greedy"].step * 1e3)
    if goals.PACE_256.card in check.machine.name and batch == 256:
        check.report.share(goals.PACE_256, batch / found["greedy"].step)
    step, tokens = found["greedy"].step, sum(len(sequence.tokens) for sequence in sequences)
    if read is goals.DECODE_1:
        sheet = goals.datasheet(check.machine.name)
        if sheet is not None:
            check.report.share(read, made.weight_bytes / step / (sheet.gb_s * 1e9))
    else:
        check.report.share(read, (made.weight_bytes + tokens * made.kv_bytes) / step / check.ceilings.copy)
    check.report.share(of_greedy, step / found["sampled"].step)


def _spells(machine: Machine, made: Made, sequences: list[Sequence], steps: int) -> Split:
    """The median spell of three, after a warm-up; of its steps the median too. Redrawn tokens count in all of them."""
    spells = sorted((_spell(machine, made, sequences, steps) for _ in range(SPELLS + 1)), key=lambda split: split.step)
    return replace(spells[len(spells) // 2], redrawn=mean(spell.redrawn for spell in spells))


def _spell(machine: Machine, made: Made, sequences: list[Sequence], steps: int) -> Split:
    stepper, marks, walls = _Stepper(made, machine.mark), list[Any](), list[float]()
    machine.wait()
    for _ in range(steps):
        started = time.perf_counter()
        marks.append(stepper.step(sequences, lambda _: 1))
        walls.append(time.perf_counter() - started)
    stepper.read()
    machine.wait()
    forward = median(machine.between(begin, middle) for begin, middle, _ in marks)
    sample = median(machine.between(middle, end) for _, middle, end in marks)
    return Split(median(walls), forward, sample, stepper.num_redrawn / (steps * len(sequences)))


class _Stepper:
    """Steps of the engine without its scheduler, each launched before the tokens of the one before are read.

    ``num_redrawn`` counts the tokens that the device had wrong.
    """

    def __init__(self, made: Made, mark: Callable[[], Any] = lambda: None) -> None:
        self.num_redrawn = 0
        self._runner, self._sampler, self._mark = made.runner, made.sampler, mark
        self._in_flight: list[tuple[Any, list[tuple[Sequence, int]]]] = []

    def step(self, sequences: list[Sequence], new: Callable[[list[int]], int]) -> tuple[Any, Any, Any]:
        """Launch a step that computes ``new`` tokens of each sequence, then read the one before.

        Returns the marks before the forward, after it and after the sampling.
        """
        chunks = [ScheduledChunk(s, s.num_known - new(s.tokens), new(s.tokens)) for s in sequences]
        begin = self._mark()
        logits = self._runner.forward(chunks)
        middle = self._mark()
        pending = [sequence.unread_row if sequence.num_unread else None for sequence in sequences]
        launched = self._sampler.launch(logits, sequences, [None] * len(sequences), pending)
        end = self._mark()
        for row, sequence in enumerate(sequences):
            sequence.num_unread, sequence.unread_row = sequence.num_unread + 1, row
        in_flight = launched, [(sequence, sequence.num_rewinds) for sequence in sequences]
        self.read()
        self._in_flight = [in_flight]
        return begin, middle, end

    def read(self) -> None:
        """Append the tokens of the step that is in flight, unless it was computed from a token that was redrawn."""
        for launched, owners in self._in_flight:
            for (sequence, rewinds), sampled in zip(owners, self._sampler.finish(launched), strict=True):
                self.num_redrawn += sampled.redrawn
                if sequence.num_rewinds == rewinds:
                    sequence.tokens.append(sampled.token_id)
                    sequence.num_unread -= 1
                    if sampled.redrawn:
                        sequence.rewind()
        self._in_flight = []

    def step_and_read(self, sequences: list[Sequence], new: Callable[[list[int]], int]) -> None:
        """A step whose tokens are read at once."""
        self.step(sequences, new)
        self.read()


def _mixed(check: Check, made: Made, sequences: list[Sequence], pages: Pages, load: Load) -> None:
    """The cost of a step with part of a prompt: of a size between recorded ones, and of a recorded size."""
    decodes, most = len(sequences), load.prompt // 2
    room = most + 1
    if not check.has_time(PART, f"steps of {decodes} decodes and part of a prompt", 5.0) or not pages.holds(1, room):
        return
    prompt = pages.sequence(random_tokens(decodes + 1000, most, made.runner.info.vocab_size), room)
    text = list(prompt.tokens)
    for chunk in (most, max(2, most - decodes)):
        of = f"{decodes} decodes and {chunk} tokens of a prompt"
        prompt.tokens = text[:chunk]

        def new(tokens: list[int], chunk: int = chunk) -> int:
            return 1 if len(tokens) > load.prompt else chunk

        def step(new: Callable[[list[int]], int] = new) -> None:
            _Stepper(made).step_and_read([*sequences, prompt], new)
            prompt.tokens.pop()

        usual = median([check.machine.seconds(step) for _ in range(SPELLS + 1)][1:])
        check.report.number(PART, f"a step of {of}", usual * 1e3, "ms")
    _profile(check, of, step, load)


def _ragged(check: Check, made: Made, load: Load) -> None:
    """A step of one long sequence and many short ones, against one with as many keys in sequences of equal length.

    Their keys are what the cache happens to hold.
    """
    long, number, short = load.ragged
    name, room = f"a step of 1 × {long:,} and {number} × {short:,} tokens", (SPELLS + 1) * load.steps + 2
    equal = (long + number * short) // (number + 1)
    if not check.has_time(PART, name, 3.0) or not Pages(made.runner).holds(number + 1, equal + 2 * room):
        return
    found, vocab_size = [], made.runner.info.vocab_size
    for lengths in ([long, *[short] * number], [equal] * (number + 1)):
        pages = Pages(made.runner)
        sequences = [
            pages.sequence(random_tokens(n, length, vocab_size), length + room) for n, length in enumerate(lengths)
        ]
        found.append(_spells(check.machine, made, sequences, load.steps).step)
    check.report.number(PART, name, found[0] * 1e3, "ms", f"{found[1] * 1e3:.2f} ms with {equal:,} tokens each")
    check.report.share(goals.RAGGED, found[0] / found[1])


def _recorded(check: Check, runner: ModelRunner) -> None:
    """The device's time for each recorded step with prefill: what the pacer starts with."""
    if not check.has_time(PART, "recorded steps with prefill", 3.0):
        return
    spells = [runner.recorded_seconds() for _ in range(1 if check.machine.smoke else SPELLS)]
    for shape in sorted(shape for shape in runner.recorded_shapes if not shape.only_decodes):
        usual = median(spell[shape] for spell in spells)
        rate = f"{shape.tokens / usual:,.0f} tok/s"
        check.report.number(PART, f"a recorded step of {shape.tokens} tokens", usual * 1e3, "ms", rate)


def _profile(check: Check, of: str, step: Callable[[], object], load: Load) -> None:
    """Profile some steps on the device and the host, kernel by kernel."""
    name = f"profile of {load.profiled} steps of {of}"
    if not check.has_time(PART, name, 5.0):
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not check.machine.smoke:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(load.profiled):
                step()
            check.machine.wait()
        rows = [
            {
                "name": event.key[:120],
                "on": str(event.device_type).rpartition(".")[2],
                "count": event.count,
                "device_us": round(float(event.self_device_time_total), 1),
                "host_us": round(float(event.self_cpu_time_total), 1),
            }
            for event in profile.key_averages()
        ]
    except Exception as error:  # noqa: BLE001 - profilers fail in unknown ways on some machines
        check.report.skipped(PART, name, str(error))
        return
    by_device = sorted(rows, key=lambda row: -row["device_us"])[:_ROWS]
    by_host = sorted(rows, key=lambda row: -row["host_us"])[:_ROWS]
    kernels = sum(row["device_us"] for row in rows if row["on"] == "CUDA")
    data = {"by device": by_device, "by host": by_host}
    check.report.number(PART, name, kernels / 1e3 / load.profiled, "ms of kernels a step", data=data)
    for title, rows in (("device_us", by_device), ("host_us", by_host)):
        for row in rows[:8]:
            check.report.say(f"          {row[title]:10.0f} {title} {row['count']:6} × {row['name'][:80]}")
