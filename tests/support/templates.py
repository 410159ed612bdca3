"""Chat templates of real families over a tiny tokenizer that has the tokens which the template writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.tiny import EOS_ID, save_tiny_tokenizer
from tokenizers import AddedToken, Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '; ' if not loop.first }}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
    "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""In the form of Llama 3.1 and its like."""

_MARKERS = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?(?:think|tool_call|tool_response)>|\[/?[A-Z_]{3,}\]")
_NOT_SPECIAL = re.compile(r"</?(?:think|tool_call|tool_response)>")


def template(name: str) -> str:
    """The text of a template in tests/data/chat_templates, by the beginning of its file's name."""
    return LLAMA3 if name == "llama3" else next(FOLDER.glob(f"*{name}*.jinja")).read_text("utf-8")


def template_folder(path: Path, name: str) -> Path:
    """A model folder as far as the front end reads it, with this template and its tokens."""
    text = template(name)
    save_tiny_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    found = dict.fromkeys(_MARKERS.findall(text))
    special = [AddedToken(token, special=True, normalized=False) for token in found if not _NOT_SPECIAL.match(token)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in found if _NOT_SPECIAL.match(token)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(text, "utf-8")
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": EOS_ID}))
    return path
