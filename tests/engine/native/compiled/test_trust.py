"""Who can have written what is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.native.compiled.trust import as_safe_as, is_ours


def file(path: Path, mode: int) -> Path:
    path.touch()
    path.chmod(mode)
    return path


@pytest.mark.parametrize(("mode", "ours"), [(0o600, True), (0o755, True), (0o664, False), (0o646, False)])
def test_ours_is_what_only_we_may_write(mode: int, ours: bool, tmp_path: Path) -> None:
    assert is_ours(file(tmp_path / "code", mode)) is ours


def test_what_somebody_else_owns_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = file(tmp_path / "code", 0o600)
    if os.geteuid() == 0:
        os.chown(code, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert not is_ours(code)


@pytest.mark.parametrize(
    ("module", "library", "safe"),
    [
        (0o664, 0o664, True),  # as with the umask 002 of many distributions
        (0o664, 0o644, True),
        (0o644, 0o755, True),
        (0o644, 0o664, False),
        (0o664, 0o666, False),
        (0o666, 0o666, True),
    ],
)
def test_as_safe_as_the_module_beside_it(module: int, library: int, safe: bool, tmp_path: Path) -> None:
    assert as_safe_as(file(tmp_path / "module", module), file(tmp_path / "library", library)) is safe
