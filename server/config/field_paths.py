"""Names of request fields as operators read and write them: in models.yaml, in metrics and in the log."""

from __future__ import annotations

import re


def field_path(path: str) -> str:
    """The path of a field without indices, and as in a request that is not wrapped in another."""
    return re.sub(r"\[\d+\]", "", path).removeprefix("generateContentRequest.")
