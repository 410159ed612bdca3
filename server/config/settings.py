"""Everything that can be set about a server, in one frozen object; the environment is read here and nowhere else.

A command-line option wins over its ``CASTOR_*`` variable, which wins over the default. An unknown ``CASTOR_*`` variable
is an error: a misspelt setting that is silently ignored is worse than a server that does not start.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from server.config.errors import ConfigError, did_you_mean

LOG_LEVELS = ("debug", "info", "warning", "error")
FOREIGN_VARIABLES = frozenset({"CASTOR_TORCH_INDEX"})
"""Read by the scripts, before there is a server."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one server; durations in seconds, sizes in bytes.

    ``data_dir`` is for what the server keeps, ``cache_dir`` for what can be made again, ``state_dir`` for what commands
    remember of their user.
    ``trusted_proxies`` are addresses or networks whose ``X-Forwarded-*`` headers count. ``allowed_hosts`` are names,
    beside those of the loopback, that a ``Host`` header may carry on a server without keys. ``cors_origins`` are the
    origins of web pages, beside the server's own, that may use it. ``body_stall_seconds`` is how long a body may pause,
    ``body_seconds`` how long it may take in all; the upload of a file may take longer as long as it keeps coming.
    Uploaded files are kept for ``file_hours``, each of at most ``max_file_bytes``; all files of one key and all files
    of all keys have limits too.
    """

    data_dir: Path
    cache_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080
    models: Path | None = None
    log_level: str = "info"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_no_keys: bool = False
    max_body_bytes: int = 20 * 1024 * 1024
    body_stall_seconds: float = 60.0
    body_seconds: float = 300.0
    max_file_bytes: int = 2 * 1024**3
    max_key_file_bytes: int = 20 * 1024**3
    max_total_file_bytes: int = 100 * 1024**3
    file_hours: float = 48.0
    keepalive_seconds: float = 15.0
    drain_seconds: float = 10.0
    trusted_proxies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    state_dir: Path = field(default_factory=lambda: _xdg({}, "", ".local/state"))

    @property
    def on_loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return is_loopback(self.host)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **overrides: Any) -> Settings:
        """The settings of ``environ`` and the options that are not None. Raises ``ConfigError``.

        ``overrides`` are named like the fields; beside them ``api_keys_file`` is the path of a file of keys.
        """
        known = known_variables()
        unknown = sorted(name for name in environ if name.startswith("CASTOR_") and name not in known)
        if unknown:
            near = did_you_mean(unknown[0], known, "CASTOR_")
            raise ConfigError(
                f"the environment variable {unknown[0]} means nothing to Castor{near}; "
                f"the known ones are {', '.join(known)}"
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        values = {name: given[name] if name in given else _read(environ, name) for name in _READERS}
        keys_file = values.pop("api_keys_file")
        if keys_file is not None:
            values["api_keys"] = (values["api_keys"] or ()) + _keys_in(Path(keys_file))
        values["cache_dir"] = values["cache_dir"] or _xdg(environ, "XDG_CACHE_HOME", ".cache")
        values["data_dir"] = values["data_dir"] or _xdg(environ, "XDG_DATA_HOME", ".local/share")
        values["cors_origins"] = tuple(_origin(text) for text in values["cors_origins"] or ())
        values["state_dir"] = values["state_dir"] or _xdg(environ, "XDG_STATE_HOME", ".local/state")
        settings = cls(**{name: value for name, value in values.items() if value is not None})
        _check(settings)
        return settings


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, means this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def known_variables() -> list[str]:
    """The names of all variables that Castor knows."""
    return sorted({_variable(name) for name in _READERS} | FOREIGN_VARIABLES)


def _variable(name: str) -> str:
    short = {"data_dir": "data", "cache_dir": "cache", "state_dir": "state"}.get(name, name)
    return f"CASTOR_{short.upper()}"


def _read(environ: Mapping[str, str], name: str) -> Any:
    """The value of a field's variable, or None where it is not set. An empty variable counts as not set."""
    variable = _variable(name)
    text = environ.get(variable, "").strip()
    if not text:
        return None
    reader, expected = _READERS[name]
    try:
        return reader(text)
    except ValueError:
        raise ConfigError(f"{variable} is {text!r}, but must be {expected}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://((?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?)/?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _origin(text: str) -> str:
    """An origin as browsers write it: in lowercase, without a slash at the end, without the port that its scheme has
    anyway. Raises ``ConfigError`` for what is none, such as a pattern or an address with a path."""
    if text in ("*", "null"):
        return text
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise ConfigError(
            f"cors_origins names {text!r}, but must hold origins of web pages: a scheme, a host and perhaps a port, as "
            "https://chat.example or http://localhost:3000; or * for every page"
        )
    return f"{found[1]}://{found[2].removesuffix(_DEFAULT_PORTS.get(found[1], '/'))}"


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _path(text: str) -> Path:
    return Path(text).expanduser()


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "host": (str, "a name or an address"),
    "port": (int, "a whole number"),
    "models": (_path, "a path"),
    "data_dir": (_path, "a path"),
    "cache_dir": (_path, "a path"),
    "state_dir": (_path, "a path"),
    "log_level": (str, "a name"),
    "api_keys": (_words, "keys separated by commas"),
    "api_keys_file": (_path, "a path"),
    "allow_no_keys": (_flag, "1 or 0"),
    "max_body_bytes": (int, "a whole number of bytes"),
    "body_stall_seconds": (float, "a number of seconds"),
    "body_seconds": (float, "a number of seconds"),
    "max_file_bytes": (int, "a whole number of bytes"),
    "max_key_file_bytes": (int, "a whole number of bytes"),
    "max_total_file_bytes": (int, "a whole number of bytes"),
    "file_hours": (float, "a number of hours"),
    "keepalive_seconds": (float, "a number of seconds"),
    "drain_seconds": (float, "a number of seconds"),
    "trusted_proxies": (_words, "addresses separated by commas"),
    "allowed_hosts": (_words, "names separated by commas"),
    "cors_origins": (_words, "origins separated by commas"),
}
assert set(_READERS) == {f.name for f in fields(Settings)} | {"api_keys_file"}


def _keys_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the file of API keys {path} cannot be read: {reason}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds no key; write one per line")
    return keys


def _xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    base = environ.get(variable, "")
    root = Path(base) if base.startswith("/") else Path(environ.get("HOME") or Path.home()) / fallback
    return root / "castor"


def _check(settings: Settings) -> None:
    limits: tuple[tuple[str, bool, str], ...] = (
        ("port", 0 <= settings.port <= 65535, "from 0 to 65535"),
        ("log_level", settings.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
        ("max_body_bytes", settings.max_body_bytes >= 1024, "at least 1024"),
        ("body_stall_seconds", 0 < settings.body_stall_seconds <= 3600, "above 0 and at most 3600"),
        ("body_seconds", 0 < settings.body_seconds <= 24 * 3600, "above 0 and at most 86400"),
        ("max_file_bytes", settings.max_file_bytes >= 0, "0 or more"),
        ("max_key_file_bytes", settings.max_key_file_bytes >= 0, "0 or more"),
        ("max_total_file_bytes", settings.max_total_file_bytes >= 0, "0 or more"),
        ("file_hours", 0 < settings.file_hours <= 24 * 365, "above 0 and at most 8760"),
        ("keepalive_seconds", 0 < settings.keepalive_seconds <= 3600, "above 0 and at most 3600"),
        ("drain_seconds", 0 <= settings.drain_seconds <= 3600, "from 0 to 3600"),
    )
    for name, holds, limit in limits:
        if not holds:
            raise ConfigError(f"{name} is {getattr(settings, name)!r}, but must be {limit}")
    for proxy in settings.trusted_proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise ConfigError(f"trusted_proxies names {proxy!r}, but must hold addresses or networks") from None
    if not (settings.api_keys or settings.on_loopback or settings.allow_no_keys):
        raise ConfigError(
            f"host {settings.host} is open to other machines and no API keys are set: "
            "set CASTOR_API_KEYS or --api-keys-file, or pass --allow-no-keys to serve everyone who can connect"
        )
