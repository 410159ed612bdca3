"""What is changed in the text of a chat template before it is used."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from server.families.table import completed

_APPEND = re.compile(r"\{%(-?)\s*set\s+_\s*=\s*(\w+\.\w+)\.append\((.+?)\)\s*(-?)%\}")
_POP = re.compile(r"\{%(-?)\s*set\s+(\w+)\s*=\s*(\w+\.\w+)\.pop\(0\)\s*(-?)%\}")
_NO_FUNCTIONS = "{%- if tools is none -%}{%- set tools = [] -%}{%- endif -%}"


def usable(tokenizer: Any) -> str:
    """The template of ``tokenizer`` with what its family's templates lack, see `completed`; with lists in namespaces
    replaced where it would change them in place, which the sandbox forbids; and with a list of no functions where it
    refuses a conversation without any."""
    text = _APPEND.sub(r"{%\1 set \2 = \2 + [\3] \4%}", tokenizer.chat_template)
    text = completed(_POP.sub(r"{%\1 set \2 = \3[0] %}{% set \3 = \3[1:] \4%}", text))
    needs_list = not _renders(tokenizer, text) and _renders(tokenizer, _NO_FUNCTIONS + text)
    return _NO_FUNCTIONS + text if needs_list else text


def _renders(tokenizer: Any, chat_template: str) -> bool:
    """Whether a template takes a conversation without functions."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=chat_template, tokenize=False)
    except (TypeError, TemplateError, LookupError, AttributeError, ArithmeticError):
        return False
    return True
