"""What a template is told of the time."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.fakes import tokenizer_folder

from server.convert.rendering import ChatMessage, Renderer, TemplateInput

HELLO = TemplateInput([ChatMessage(role="user", content="Hi")])


@pytest.mark.parametrize("form", ["%d %B %Y", "%Y-%m-%d %H:%M:%S.%f"])
def test_all_prompts_of_a_day_are_alike(tmp_path: Path, form: str) -> None:
    folder = tokenizer_folder(tmp_path / "model")
    template = f"Today is {{{{ strftime_now('{form}') }}}}. {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)
    now = datetime(2026, 2, 28, 0, 0, 1)
    renderer = Renderer(folder, lambda: now)

    def prompt() -> str:
        return str(renderer.tokenizer.decode(renderer.ids(HELLO)))

    first = prompt()
    assert f"Today is {datetime(2026, 2, 28).strftime(form)}." in first
    now += timedelta(hours=23, minutes=59, seconds=58, microseconds=999)
    assert prompt() == first
    now += timedelta(seconds=1)
    assert f"Today is {datetime(2026, 3, 1).strftime(form)}." in prompt()
