"""What becomes of the text of a template."""

from __future__ import annotations

from pathlib import Path

from support.fakes import tokenizer_folder

from server.convert.rendering import ChatMessage, Renderer, TemplateInput
from server.convert.template_text import usable
from server.families.table import FAMILIES

QUEUE = """{%- set queue = namespace(names=[]) -%}
{%- for message in messages -%}{%- set _ = queue.names.append('<' + message.content + '>') -%}{%- endfor -%}
{%- for message in messages -%}
  {%- set first = queue.names.pop(0) -%}{{ first }}{{ queue.names | length }}
{%- endfor -%}"""


def test_lists_that_a_template_changes_in_place(tmp_path: Path) -> None:
    """Nothing else of it changes, and the sandbox lets it."""
    folder = tokenizer_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(QUEUE)
    renderer = Renderer(folder)
    chat = TemplateInput([ChatMessage(role="user", content=text) for text in "ab"])
    assert str(renderer.tokenizer.decode(renderer.ids(chat))).endswith("<a>1<b>0")


def test_other_templates_stay_as_they_are() -> None:
    for template in ("", "{{ messages }}", "{% set x = [1] %}{% set _ = x.append(2) %}", "{% set ns.x = ns.x + [1] %}"):
        assert usable(template) == template


def test_templates_that_show_no_calls_are_completed() -> None:
    (family,) = [family for family in FAMILIES if family.name == "lfm2"]
    text = " ".join(family.incomplete)
    assert usable(text) == family.opening + text
