"""Thought signatures: the thoughts of a turn in a signed envelope that clients carry for the server.

Clients send ``thoughtSignature`` back as it came, but not the thoughts beside it. So the signature holds them, and a
tool loop keeps its reasoning while the server keeps no state. Layout, in bytes: version (1), HMAC-SHA256 (32), thoughts
(UTF-8, deflated). The code binds the thoughts to this server's key and to the caller's identity; it hides nothing: the
thoughts belong to the caller anyway.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import zlib
from contextlib import suppress
from pathlib import Path

from server.config.errors import ConfigError

KEY_FILE = "signature.key"
KEY_BYTES = 32
MAX_THOUGHT_BYTES = 256 * 1024
"""Of the text. Longer thoughts are not sealed: some clients repeat every signature in each request of a loop."""

_VERSION = b"\x01"
_CODE_BYTES = 32
_PURPOSE = b"castor thought signature\0"


class Signer:
    """Seals and opens the signatures of one caller: what was sealed for one identity does not open for another."""

    def __init__(self, key: bytes, identity: str) -> None:
        self._key = hmac.digest(key, _PURPOSE + identity.encode(), "sha256")

    def seal(self, thoughts: str) -> str | None:
        """A ``thoughtSignature`` in standard base64; None where there are no thoughts, or more than are carried."""
        text = thoughts.encode(errors="replace")
        if not text or len(text) > MAX_THOUGHT_BYTES:
            return None
        payload = zlib.compress(text)
        return base64.b64encode(_VERSION + self._code(payload) + payload).decode()

    def open_signature(self, data: bytes) -> str | None:
        """The thoughts in a signature that this server made for this caller; None for every other one."""
        version, code, payload = data[:1], data[1 : 1 + _CODE_BYTES], data[1 + _CODE_BYTES :]
        if version != _VERSION or not hmac.compare_digest(code, self._code(payload)):
            return None
        return zlib.decompress(payload).decode()

    def _code(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, "sha256")


def signature_key(data_dir: Path) -> bytes:
    """The server's key, made when there is none; servers that share the folder share the key. Its file is for the owner
    alone.

    Raises ``ConfigError`` where the key can be neither read nor made, nor kept from others.
    """
    path = data_dir / KEY_FILE
    try:
        if path.exists() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
        key = path.read_bytes() if path.exists() else _new_key(path)
    except OSError as error:
        raise ConfigError(
            f"the key of thought signatures at {path} cannot be read or created: {error.strerror}"
        ) from None
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path} holds {len(key)} bytes, not the {KEY_BYTES} of a key: remove it to get a new one")
    return key


def _new_key(path: Path) -> bytes:
    """Written to a temporary file and linked into place complete; of several processes the first one wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    return path.read_bytes()
