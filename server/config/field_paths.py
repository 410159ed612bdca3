"""Names of request fields as operators read and write them: in models.yaml, in metrics and in the log."""

from __future__ import annotations

import re

_SCHEMA = re.compile(
    r"(generationConfig\.response(?:Schema|JsonSchema|Format\.text\.schema)"
    r"|tools\.functionDeclarations\.parameters(?:JsonSchema)?)\b.*"
)


def field_path(path: str) -> str:
    """The path of a field without indices, and as in a request that is not wrapped in another; without what is within a
    schema, which is the caller's."""
    field = re.sub(r"\[\d+\]", "", path.removesuffix(" (unchecked)")).removeprefix("generateContentRequest.")
    return _SCHEMA.sub(r"\1", field, count=1)
