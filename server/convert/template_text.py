"""What is changed in the text of a chat template before it is used."""

from __future__ import annotations

import re

from server.families.table import completed

_APPEND = re.compile(r"\{%(-?)\s*set\s+_\s*=\s*(\w+\.\w+)\.append\((.+?)\)\s*(-?)%\}")
_POP = re.compile(r"\{%(-?)\s*set\s+(\w+)\s*=\s*(\w+\.\w+)\.pop\(0\)\s*(-?)%\}")


def usable(chat_template: str) -> str:
    """The template with what its family's templates lack, see `completed`, and with lists in namespaces replaced where
    it would change them in place: the sandbox forbids that, and so such templates would refuse every call."""
    text = _APPEND.sub(r"{%\1 set \2 = \2 + [\3] \4%}", chat_template)
    return completed(_POP.sub(r"{%\1 set \2 = \3[0] %}{% set \3 = \3[1:] \4%}", text))
