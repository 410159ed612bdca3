"""What this processor can do, as Linux says it."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# x86 has flags, ARM has Features. Linux leaves out what it has not enabled.
_FEATURES = ("flags", "Features")


def features() -> frozenset[str]:
    """The names of the extensions that every core has; none where the system does not say."""
    found = [set(value.split()) for name, value in _lines() if name in _FEATURES]
    return frozenset(set.intersection(*found)) if found else frozenset()


def description() -> str:
    """All that decides what a compiler makes for this very processor."""
    kept = ("model name", *_FEATURES, "CPU part", "CPU implementer")
    lines = {f"{name}: {value}" for name, value in _lines() if name in kept}
    return "\n".join(sorted(lines)) or platform.processor()


def _lines() -> list[tuple[str, str]]:
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]
