"""What becomes of the text of a template."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fakes import tokenizer_folder

from server.convert.rendering import ChatMessage, Renderer, TemplateInput
from server.families.table import FAMILIES

QUEUE = """{%- set queue = namespace(names=[]) -%}
{%- for message in messages -%}{%- set _ = queue.names.append('<' + message.content + '>') -%}{%- endfor -%}
{%- for message in messages -%}
  {%- set first = queue.names.pop(0) -%}{{ first }}{{ queue.names | length }}
{%- endfor -%}"""
CHAT = TemplateInput([ChatMessage(role="user", content=text) for text in "ab"])


def renderer(folder: Path, template: str) -> Renderer:
    tokenizer_folder(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Renderer(folder)


def rendered(folder: Path, template: str) -> str:
    made = renderer(folder, template)
    return str(made.tokenizer.decode(made.ids(CHAT)))


def test_lists_that_a_template_changes_in_place(tmp_path: Path) -> None:
    assert rendered(tmp_path, QUEUE).endswith("<a>1<b>0")


def test_a_template_that_was_written_for_functions_only(tmp_path: Path) -> None:
    template = "{% for tool in tools %}{{ tool }}{% endfor %}{{ messages[0].content }}"
    assert rendered(tmp_path, template).endswith("a")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages }}",
        "{% set x = [1] %}{% set _ = x.append(2) %}",
        "{% if tools is none %}none{% endif %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_other_templates_stay_as_they_are(tmp_path: Path, template: str) -> None:
    assert renderer(tmp_path, template).tokenizer.chat_template == template


def test_templates_that_show_no_calls_are_completed(tmp_path: Path) -> None:
    (family,) = [family for family in FAMILIES if family.name == "lfm2"]
    text = " ".join(family.incomplete)
    assert renderer(tmp_path, text).tokenizer.chat_template == family.opening + text
