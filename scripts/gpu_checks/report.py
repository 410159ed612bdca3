"""The findings: printed as they come, kept in a file that is complete at any time, and summed up in one table."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_checks.goals import GOALS, Goal

MEASURED, RIGHT, WRONG, FAILED, SKIPPED = "measured", "ok", "WRONG", "FAILED", "skipped"
# How long the final table waits for a line that is being written.
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One number, one comparison (``value`` is the worst difference) or one thing that was skipped or failed."""

    part: str
    name: str
    state: str = MEASURED
    value: float | None = None
    unit: str = ""
    allowed: float | None = None
    note: str = ""
    data: Any = None

    def line(self) -> str:
        """For people."""
        number = ""
        if self.allowed is not None:
            number = f"{self.value:.1e} of {self.allowed:.0e}"
        elif self.value is not None:
            number = f"{self.value:,.4g} {self.unit}"
        state = "" if self.state == MEASURED else self.state
        return f"  {state:8}{self.name:60} {number}{f'  ({self.note})' if self.note else ''}".rstrip()


class Report:
    """All findings of a run. Safe to use from the watchdog's thread."""

    def __init__(self, path: Path | None, minutes: float, parts: Sequence[str]) -> None:
        self.findings: list[Finding] = []
        self.environment: dict[str, str] = {}
        self._path = path
        self._minutes = minutes
        self._parts = parts
        self._started = time.monotonic()
        self._doing = "starting"
        self._seconds: dict[str, float] = {}
        self._end = ""
        self._lock = threading.RLock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def describe(self, environment: dict[str, str]) -> None:
        """Record what the numbers depend on."""
        self.environment = environment
        self.say(", ".join(f"{name} {value}" for name, value in environment.items()))
        self._write()

    def doing(self, what: str) -> None:
        """Record what is running, so that the file shows what the process died in."""
        with self._lock:
            self._doing = what
            self._write()

    def took(self, part: str, seconds: float) -> None:
        """A part has ended."""
        with self._lock:
            self._seconds[part] = round(seconds, 1)
            self._doing = ""
            self.say(f"  {part} took {seconds:.0f} s")
            self._write()

    def number(self, part: str, name: str, value: float, unit: str, note: str = "", data: Any = None) -> None:
        """Something was measured."""
        self._add(Finding(part, name, MEASURED, value, unit, note=note, data=data))

    def share(self, goal: Goal, value: float, note: str = "") -> None:
        """The number of a goal was measured."""
        self._add(Finding(goal.part, goal.name, MEASURED, value, goal.unit, note=note))

    def compared(self, part: str, name: str, worst: float, allowed: float, note: str = "") -> None:
        """Two computations of the same result were compared; NaN counts as wrong too."""
        state = RIGHT if worst <= allowed else WRONG
        self._add(Finding(part, name, state, worst, allowed=allowed, note=note))

    def checked(self, part: str, name: str, holds: bool, note: str = "") -> None:
        """Something that must hold was checked."""
        self._add(Finding(part, name, RIGHT if holds else WRONG, note=note))

    def skipped(self, part: str, name: str, reason: str) -> None:
        """Something was left out for ``reason``."""
        self._add(Finding(part, name, SKIPPED, note=reason))

    def failed(self, part: str, name: str, error: BaseException | str) -> None:
        """Something could not be computed."""
        self._add(Finding(part, name, FAILED, note=error if isinstance(error, str) else reason_of(error)))

    def value(self, part: str, name: str) -> float | None:
        """The measured value of that name, if any."""
        return next((f.value for f in self.findings if (f.part, f.name) == (part, name)), None)

    def finish(self, end: str = "") -> None:
        """Print the table; ``end`` says what ended the run early. Never waits for long."""
        locked = self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            self._end = f"{end} while at: {self._doing}" if end and self._doing else end
            for line in self.table():
                self.say(line)
            self._write()
        finally:
            if locked:
                self._lock.release()

    def table(self) -> list[str]:
        """The goals, and everything that is wrong."""
        lines = [f"{self.environment.get('device', 'no device')}, {time.monotonic() - self._started:.0f} s in all"]
        lines.append(f"  {'':72}{'goal':>9}{'least':>9}{'measured':>11}{'ratio':>7}")
        for goal in [goal for goal in GOALS if goal.part in self._parts and goal.card in str(self.environment)]:
            measured = self.value(goal.part, goal.name)
            sign = "≤" if goal.at_most else ""
            wanted = "".join(f"{sign + format(number, ',.4g'):>9}" for number in (goal.goal, goal.least))
            found = f"{'–':>11}{'–':>7}" if measured is None else f"{measured:11,.4g}{goal.ratio(measured):7.2f}"
            verdict = "" if measured is None else f"  {goal.verdict(measured)}"
            lines.append(f"  {goal.part + ': ' + goal.name:72}{wanted}{found}{verdict}")
        comparisons = [f for f in self.findings if f.state in (RIGHT, WRONG)]
        wrong = sum(f.state == WRONG for f in comparisons)
        lines.append(f"  comparisons: {len(comparisons) - wrong} right, {wrong} wrong")
        odd = [f for f in self.findings if f.state in (WRONG, FAILED, SKIPPED)]
        lines += [f"  {f.state:8}{f.part}: {f.name}{f'  ({f.note})' if f.note else ''}" for f in odd]
        return [*lines, f"  {self._end}"] if self._end else lines

    @property
    def is_bad(self) -> bool:
        """Whether a number is wrong or a part failed."""
        return any(finding.state in (WRONG, FAILED) for finding in self.findings)

    def _add(self, finding: Finding) -> None:
        with self._lock:
            self.findings.append(finding)
            self.say(finding.line())
            self._write()

    def say(self, line: str) -> None:
        """Print a line that the file does not keep."""
        print(line, flush=True)

    def _write(self) -> None:
        if self._path is None:
            return
        document = {
            "environment": self.environment,
            "minutes": self._minutes,
            "parts": list(self._parts),
            "seconds": self._seconds,
            "doing": self._doing,
            "end": self._end,
            "goals": [asdict(goal) | {"measured": self.value(goal.part, goal.name)} for goal in GOALS],
            "findings": [_plain(asdict(finding)) for finding in self.findings],
        }
        beside = self._path.with_name(self._path.name + ".part")
        beside.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        os.replace(beside, self._path)


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:400] if first_line else type(error).__name__


def _plain(finding: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON lacks."""
    value = finding["value"]
    kept = {name: entry for name, entry in finding.items() if entry not in (None, "")}
    return kept if value is None or math.isfinite(value) else kept | {"value": str(value)}
