"""Where settings come from, which win, and which are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from server.config.errors import ConfigError
from server.config.settings import Settings, is_loopback, known_variables


def test_defaults_bind_the_loopback_and_follow_xdg() -> None:
    settings = Settings.from_env({"HOME": "/home/u"})
    assert (settings.host, settings.port, settings.on_loopback) == ("127.0.0.1", 8080, True)
    assert settings.cache_dir == Path("/home/u/.cache/castor")
    assert settings.data_dir == Path("/home/u/.local/share/castor")
    assert settings.state_dir == Path("/home/u/.local/state/castor")
    moved = Settings.from_env({"XDG_CACHE_HOME": "/c", "XDG_DATA_HOME": "relative/is/void", "HOME": "/home/u"})
    assert moved.cache_dir == Path("/c/castor")
    assert moved.data_dir == Path("/home/u/.local/share/castor")


def test_an_option_wins_over_its_variable() -> None:
    environ = {"CASTOR_PORT": "9000", "CASTOR_LOG_LEVEL": "debug", "CASTOR_CACHE": "/c", "CASTOR_DATA": "/d"}
    settings = Settings.from_env(environ, port=9001, log_level=None)
    assert (settings.port, settings.log_level) == (9001, "debug")
    assert (settings.cache_dir, settings.data_dir) == (Path("/c"), Path("/d"))


def test_an_option_hides_a_wrong_variable() -> None:
    assert Settings.from_env({"CASTOR_PORT": "many"}, port=1).port == 1


def test_unknown_variable_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.from_env({"CASTOR_PROT": "1"})
    assert "CASTOR_PROT means nothing to Castor (did you mean CASTOR_PORT?)" in str(refused.value)
    with pytest.raises(ConfigError, match=r"CASTOR_ELEPHANT means nothing to Castor; the known ones"):
        Settings.from_env({"CASTOR_ELEPHANT": "1"})
    assert all(name in str(refused.value) for name in known_variables())
    Settings.from_env({"CASTOR_TORCH_INDEX": "https://example.org", "OTHER": "1"})


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CASTOR_PORT", "eighty", "CASTOR_PORT is 'eighty', but must be a whole number"),
        ("CASTOR_PORT", "70000", "port is 70000, but must be from 0 to 65535"),
        ("CASTOR_LOG_LEVEL", "loud", "one of debug, info, warning, error"),
        ("CASTOR_DRAIN_SECONDS", "-1", "drain_seconds is -1.0, but must be from 0 to 3600"),
        ("CASTOR_DRAIN_SECONDS", "nan", "from 0 to 3600"),
        ("CASTOR_KEEPALIVE_SECONDS", "0", "above 0"),
        ("CASTOR_MAX_BODY_BYTES", "5", "at least 1024"),
        ("CASTOR_BODY_SECONDS", "inf", "body_seconds is inf, but must be above 0 and at most 86400"),
        ("CASTOR_ALLOW_NO_KEYS", "perhaps", "1 or 0"),
        ("CASTOR_TRUSTED_PROXIES", "10.0.0.0/8, gateway", "'gateway'"),
        ("CASTOR_CORS_ORIGINS", "chat.example", "cors_origins names 'chat.example', but must hold origins"),
        ("CASTOR_CORS_ORIGINS", "https://chat.example/app", "a scheme, a host and perhaps a port"),
        ("CASTOR_CORS_ORIGINS", "https://*.example", "or * for every page"),
        ("CASTOR_CORS_ORIGINS", "https://user@chat.example", "as https://chat.example"),
        ("CASTOR_CORS_ORIGINS", "https://bücher.example", "bücher"),
    ],
)
def test_bad_values_name_field_value_and_limit(variable: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as refused:
        Settings.from_env({variable: value})
    assert expected in str(refused.value)


def test_keys_from_variable_and_file_and_never_in_a_repr(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team\n\nalpha \n  beta\n")
    settings = Settings.from_env({"CASTOR_API_KEYS": "one, two ,"}, api_keys_file=file)
    assert settings.api_keys == ("one", "two", "alpha", "beta")
    assert "alpha" not in repr(settings)


@pytest.mark.parametrize("content", [None, b"# nothing\n", b"\xff\xfe"])
def test_a_file_of_keys_without_keys_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="the file of API keys"):
        Settings.from_env({"CASTOR_API_KEYS_FILE": str(file)})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box"])
def test_without_keys_only_the_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-no-keys"):
        Settings.from_env({}, host=host)
    assert Settings.from_env({"CASTOR_ALLOW_NO_KEYS": "1"}, host=host).host == host
    assert Settings.from_env({"CASTOR_API_KEYS": "k"}, host=host).api_keys == ("k",)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("LocalHost", True), ("localhost.evil.org", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_settings_are_frozen() -> None:
    settings: Any = Settings.from_env({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://chat.example", "https://chat.example"),
        ("https://Chat.Example/", "https://chat.example"),
        ("HTTPS://chat.example:443", "https://chat.example"),
        ("http://localhost:80/", "http://localhost"),
        ("http://localhost:443", "http://localhost:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:5173", "http://[::1]:5173"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_an_origin_is_understood_as_browsers_write_it(text: str, origin: str) -> None:
    assert Settings.from_env({"CASTOR_CORS_ORIGINS": text}).cors_origins == (origin,)
    assert Settings.from_env({}, cors_origins=(text,)).cors_origins == (origin,)
