"""Memory by the machine and by the limits of control groups, read from folders that stand for /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.machines import machine

from engine.device.machine_memory import available_bytes, total_bytes

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {12 << 20} kB\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
NO_LIMIT_V1 = "9223372036854771712\n"


def told(root: Path, groups: str, mounts: str = "", **files: str) -> tuple[float, float]:
    """All memory and what is available, in GiB."""
    place = machine(root, groups, mounts, MEMINFO, **files)
    return total_bytes(place) / GIB, available_bytes(place) / GIB


def gib(number: float) -> str:
    return f"{int(number * GIB)}\n"


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert told(tmp_path, "") == (16, 12)


def test_a_system_without_proc(tmp_path: Path) -> None:
    all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (total_bytes(tmp_path), available_bytes(tmp_path)) == (all_of_it, all_of_it)


def test_this_machine() -> None:
    assert 0 < available_bytes() <= total_bytes()


def test_a_container_of_version_2_is_the_root_of_its_mount(tmp_path: Path) -> None:
    files = {"memory.max": gib(2), "memory.high": "max\n", "memory.current": gib(0.5), "memory.stat": "anon 1\n"}
    assert told(tmp_path, "0::/\n", V2_MOUNT, **files) == (2, 1.5)


def test_files_that_nobody_has_used_lately_can_be_given_back(tmp_path: Path) -> None:
    files = {"memory.max": gib(2), "memory.current": gib(1.5), "memory.stat": f"file {GIB}\ninactive_file {GIB}\n"}
    assert told(tmp_path, "0::/\n", V2_MOUNT, **files) == (2, 1.5)


def test_what_slows_a_group_down_is_a_limit_too(tmp_path: Path) -> None:
    files = {"memory.max": gib(4), "memory.high": gib(3), "memory.current": gib(1)}
    assert told(tmp_path, "0::/\n", V2_MOUNT, **files) == (3, 2)


@pytest.mark.parametrize(("outer", "inner", "expected"), [(3, "max\n", (3, 1)), (8, gib(2), (2, 1.5))])
def test_the_least_of_all_groups_above(outer: float, inner: str, expected: tuple[float, float], tmp_path: Path) -> None:
    files = {
        "system.slice__memory.max": gib(outer),
        "system.slice__memory.current": gib(2),
        "system.slice__castor.service__memory.max": inner,
        "system.slice__castor.service__memory.current": gib(0.5),
    }
    assert told(tmp_path, "0::/system.slice/castor.service\n", V2_MOUNT, **files) == expected


@pytest.mark.parametrize("groups", ["0::/kubepods/pod/abc\n", "0::/../../other\n"])
def test_a_name_of_the_host_that_cannot_be_found_in_the_container(groups: str, tmp_path: Path) -> None:
    assert told(tmp_path, groups, V2_MOUNT, **{"memory.max": gib(2), "memory.current": gib(1)}) == (2, 1)


def test_more_than_the_limit_in_use_leaves_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, "0::/\n", V2_MOUNT, **{"memory.max": gib(1), "memory.current": gib(2)}) == (1, 0)


@pytest.mark.parametrize("limit", [gib(2**33 - 1), NO_LIMIT_V1, "max\n", "-1\n", "", "garbage\n"])
def test_limits_beyond_all_memory_are_none(limit: str, tmp_path: Path) -> None:
    files = {"memory__memory.limit_in_bytes": limit, "memory__memory.usage_in_bytes": gib(0.5)}
    assert told(tmp_path, "4:memory:/\n", **files) == (16, 12)


def test_version_1_without_a_namespace_of_its_own(tmp_path: Path) -> None:
    """The mount shows the container's group, whose name is the host's; groups within it are found below."""
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    files = {
        "memory__memory.limit_in_bytes": gib(2),
        "memory__memory.usage_in_bytes": gib(1.5),
        "memory__memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
        "memory__inner__memory.limit_in_bytes": NO_LIMIT_V1,
        "memory__inner__memory.usage_in_bytes": gib(0.25),
    }
    assert told(tmp_path, "5:memory:/docker/abc/inner\n", mount, **files) == (2, 1)
    files["memory__inner__memory.limit_in_bytes"] = gib(0.5)
    assert told(tmp_path, "5:memory:/docker/abc/inner\n", mount, **files) == (0.5, 0.25)


def test_version_1_tells_of_limits_that_cannot_be_seen(tmp_path: Path) -> None:
    files = {
        "memory__memory.limit_in_bytes": NO_LIMIT_V1,
        "memory__memory.usage_in_bytes": gib(0.5),
        "memory__memory.stat": f"hierarchical_memory_limit {2 * GIB}\n",
    }
    assert told(tmp_path, "4:memory:/\n", **files) == (2, 1.5)


def test_both_versions_at_once(tmp_path: Path) -> None:
    """Memory belongs to version 1 here; version 2 is mounted beside it and holds nothing of memory."""
    mounts = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/my\\040cpus rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    )
    groups = "9:name=systemd:/\n4:memory:/jobs/1\n1:cpu,cpuacct:/\n0::/jobs/1\n"
    files = {
        "memory__jobs__memory.limit_in_bytes": gib(4),
        "memory__jobs__memory.usage_in_bytes": gib(1),
        "memory__jobs__1__memory.limit_in_bytes": gib(6),
        "memory__jobs__1__memory.usage_in_bytes": gib(1),
        "unified__jobs__1__cgroup.procs": "1\n",
    }
    assert told(tmp_path, groups, mounts, **files) == (4, 3)
