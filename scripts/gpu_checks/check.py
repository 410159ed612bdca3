"""What each part uses: the machine, its time, the models and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from subprocess import Popen
from typing import TYPE_CHECKING

from gpu_checks.budget import Budget
from gpu_checks.report import Report

if TYPE_CHECKING:  # a part that needs no torch should not wait for it
    from gpu_checks.machine import Ceilings, Machine
    from gpu_checks.models import Models


@dataclass
class Check:
    """One run. ``children`` are processes that must not outlive it."""

    machine: Machine
    models: Models
    budget: Budget
    report: Report
    children: list[Popen[bytes]] = field(default_factory=list)

    @cached_property
    def ceilings(self) -> Ceilings:
        """The device's peak rates, measured at first use."""
        from gpu_checks.machine import measure_ceilings

        self.report.doing("ceilings")
        ceilings: Ceilings = measure_ceilings(self.machine)
        return ceilings

    def has_time(self, part: str, name: str, seconds: float = 0.0) -> bool:
        """Whether the part has time for something that takes about ``seconds``; if not, it is reported as skipped."""
        self.report.doing(f"{part}: {name}")
        if self.budget.left > seconds:
            return True
        self.report.skipped(part, name, f"out of time: {max(0.0, self.budget.left):.0f} s left for this part")
        return False

    def end_children(self) -> None:
        """Kill child processes that are still running."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
