"""The control groups that bound this process, as folders: its own and all above it, in versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def folders(controller: str, root: Path) -> Iterator[Path]:
    """Where the files of ``controller`` may lie for this process: its own group first, then each one above.

    ``root`` is where /proc and /sys are. Version 2 keeps all controllers in one folder, version 1 each in its own; a
    machine may have both. A folder that does not exist or has no such files sets no limit.
    """
    mounts = _mounts(root)
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, top = mounts.get("", (root / "sys/fs/cgroup", "/"))
        elif controller in controllers.split(","):
            mount, top = mounts.get(controller, (root / "sys/fs/cgroup" / controller, "/"))
        else:
            continue
        group = mount / _below(name, top)
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def read(path: Path) -> str:
    """The text of a system file; empty if there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _below(name: str, top: str) -> str:
    """The path of a group from the mount whose root is the group ``top``.

    In a container the name may be that of the host, or outside what can be seen: the mount itself is then the closest
    group that is known.
    """
    if ".." in name.split("/"):
        return ""
    return name.removeprefix(top.rstrip("/")).lstrip("/")


def _mounts(root: Path) -> dict[str, tuple[Path, str]]:
    """By controller ("" for version 2): where its groups are mounted, and which group is the root of the mount."""
    found: dict[str, tuple[Path, str]] = {}
    for line in read(root / "proc/self/mountinfo").splitlines():
        place, _, source = line.partition(" - ")
        kind, *_, options = source.split(" ")
        top, point = (field.replace(r"\040", " ") for field in place.split(" ")[3:5])
        names = {"cgroup": options.split(","), "cgroup2": [""]}.get(kind, ())
        for name in names:
            found.setdefault(name, (root / point.lstrip("/"), top))
    return found
