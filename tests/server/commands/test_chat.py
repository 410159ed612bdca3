"""``castor chat``: the addresses that it refuses."""

from __future__ import annotations

import pytest

from server.commands.chat import chat
from server.config.errors import ConfigError


@pytest.mark.parametrize(
    "url", ["nonsense", "", "ftp://127.0.0.1", "http://127.0.0.1:port", "http://[::1", "http://a b", "http://a..b"]
)
def test_what_is_not_the_url_of_a_server_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        chat(url, None, None)
    sentence = str(raised.value)
    assert repr(url) in sentence
    assert "write it like http://127.0.0.1:8080" in sentence
    assert "\n" not in sentence
