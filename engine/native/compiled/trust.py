"""Who can have written a file that is about to be run."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_ours(path: Path) -> bool:
    """Whether only this user, or root, can have written it: what is loaded runs with all rights of this process."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def as_safe_as(module: Path, path: Path) -> bool:
    """Whether nobody may write ``path`` who may not write a module beside it: such a one has anything run already."""
    known, found = module.stat(), path.stat()
    same_owners = (known.st_uid, known.st_gid) == (found.st_uid, found.st_gid)
    return same_owners and not found.st_mode & ~known.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
