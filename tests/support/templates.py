"""Chat templates of families over a tiny tokenizer that has the tokens which the template writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.tiny import EOS_ID, save_tiny_tokenizer
from tokenizers import AddedToken, Tokenizer

from server.families.table import completed

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
_MARKERS = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?(?:think|tool_call|tool_response|arg_key|arg_value)>|\[/?[A-Z_]{3,}\]"
    r"|\[\|\w+\|\]|</?(?:seed|minimax):\w+>|<SPECIAL_\d+>|\[gMASK\]|<sop>|\]~b\]|\]~!b\[|\[e~\["
)
_NOT_SPECIAL = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")


def template(name: str) -> str:
    """The text of a template in tests/data/chat_templates, by its file's name."""
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def template_folder(path: Path, name: str) -> Path:
    """A model folder as far as the front end reads it, with this template and its tokens."""
    return folder_with(path, template(name))


def folder_with(path: Path, text: str) -> Path:
    """As `template_folder`, with the text of a template."""
    save_tiny_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    found = dict.fromkeys(_MARKERS.findall(completed(text)))
    special = [AddedToken(token, special=True, normalized=False) for token in found if not _NOT_SPECIAL.match(token)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in found if _NOT_SPECIAL.match(token)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(text, "utf-8")
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": EOS_ID}))
    return path
