"""Thought signatures: only what this server sealed for this caller opens."""

from __future__ import annotations

import base64
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from server.config.errors import ConfigError
from server.mapper.thought_signature import KEY_BYTES, KEY_FILE, MAX_THOUGHT_BYTES, Signer, signature_key

KEY = b"k" * KEY_BYTES


def sealed(thoughts: str, key: bytes = KEY, identity: str = "") -> bytes:
    signature = Signer(key, identity).seal(thoughts)
    assert signature is not None
    return base64.b64decode(signature, validate=True)


def test_thoughts_come_back() -> None:
    for thoughts in ("Paris, é 你好 😀\n", "x" * MAX_THOUGHT_BYTES):
        assert Signer(KEY, "me").open_signature(sealed(thoughts, identity="me")) == thoughts


def test_long_thoughts_take_little_room() -> None:
    assert len(sealed("I should look that up. " * 1000)) < 2000


@pytest.mark.parametrize("thoughts", ["", "x" * (MAX_THOUGHT_BYTES + 1), "é" * MAX_THOUGHT_BYTES])
def test_nothing_and_too_much_are_not_sealed(thoughts: str) -> None:
    assert Signer(KEY, "").seal(thoughts) is None


def test_half_a_character_does_no_harm() -> None:
    assert Signer(KEY, "").open_signature(sealed("a\ud83d")) == "a?"


@pytest.mark.parametrize("identity", ["", "you", "me2"])
def test_what_was_sealed_for_one_caller_does_not_open_for_another(identity: str) -> None:
    assert Signer(KEY, identity).open_signature(sealed("secret", identity="me")) is None


def test_another_server_cannot_open_it() -> None:
    assert Signer(b"j" * KEY_BYTES, "").open_signature(sealed("x")) is None


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x01" * 33, b"skip_thought_signature_validator", b"\x00" * 500])
def test_foreign_bytes_say_nothing(data: bytes) -> None:
    assert Signer(KEY, "").open_signature(data) is None


def test_every_changed_byte_is_noticed() -> None:
    whole, signer = sealed("think"), Signer(KEY, "")
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        assert signer.open_signature(bytes(broken)) is None
    assert all(signer.open_signature(whole[:length]) is None for length in range(len(whole)))
    assert signer.open_signature(whole + b"x") is None


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    key = signature_key(tmp_path / "data")
    assert len(key) == KEY_BYTES
    assert signature_key(tmp_path / "data") == key
    (found,) = (tmp_path / "data").iterdir()
    assert found.name == KEY_FILE
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert signature_key(tmp_path / "other") != key


def test_a_key_that_others_could_read_is_kept_from_them(tmp_path: Path) -> None:
    key = signature_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    assert signature_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    context = get_context("spawn")  # a fork of this process could copy a lock that another of its threads holds
    together = context.Barrier(4)
    with ProcessPoolExecutor(4, context, initializer=together.wait, initargs=(60,)) as pool:
        keys = set(pool.map(signature_key, [tmp_path] * 16, timeout=60))
    assert len(keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_a_key_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(ConfigError, match="holds 5 bytes"):
        signature_key(tmp_path)


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be read or created"):
        signature_key(tmp_path / "file")
