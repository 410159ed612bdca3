"""URLs of servers as users write them."""

from __future__ import annotations

import pytest

from server.bench.wire.client import BaseUrl, parse_url
from server.config.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8080", BaseUrl("http", "127.0.0.1", 8080, "")),
        ("http://localhost:1/genai/", BaseUrl("http", "localhost", 1, "/genai")),
        ("https://example.org", BaseUrl("https", "example.org", 443, "")),
        ("http://[::1]:80", BaseUrl("http", "::1", 80, "")),
    ],
)
def test_urls(text: str, url: BaseUrl) -> None:
    assert parse_url(text) == url
    assert parse_url(str(url)) == url


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "ftp://x", "http://", "http://x:y", "http://x?key=k", "http://u@x"])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like http://127"):
        parse_url(text)
