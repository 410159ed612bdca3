"""Cores by affinity and by the quotas of control groups, read from folders that stand for /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.machines import machine

from engine.device import cpu_count
from engine.device.cpu_count import cores, default_threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_a_machine_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores(tmp_path) == 5


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 8), ("max 100000", 8)],
)
def test_the_quota_of_a_container(quota: str, expected: int, tmp_path: Path) -> None:
    assert cores(machine(tmp_path, "0::/\n", **{"cpu.max": quota + "\n"})) == expected


def test_the_least_of_all_groups_above(tmp_path: Path) -> None:
    files = {"system.slice__cpu.max": "300000 100000", "system.slice__castor.service__cpu.max": "max 100000"}
    assert cores(machine(tmp_path, "0::/system.slice/castor.service\n", **files)) == 3


@pytest.mark.parametrize(("quota", "expected"), [("250000", 3), ("-1", 8)])
def test_the_first_version_of_control_groups(quota: str, expected: int, tmp_path: Path) -> None:
    """A container's name is the host's, which is not found in the container."""
    files = {"cpu__cpu.cfs_quota_us": quota + "\n", "cpu__cpu.cfs_period_us": "100000\n"}
    groups = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n"
    assert cores(machine(tmp_path, groups, **files)) == expected


def test_a_mount_that_shows_a_group_of_the_host(tmp_path: Path) -> None:
    mount = "33 31 0:30 /docker/abc /sys/fs/cgroup/cpus rw - cgroup cgroup rw,cpu,cpuacct\n"
    files = {"cpus__inner__cpu.cfs_quota_us": "200000\n", "cpus__inner__cpu.cfs_period_us": "100000\n"}
    assert cores(machine(tmp_path, "4:cpu,cpuacct:/docker/abc/inner\n", mount, **files)) == 2


@pytest.mark.parametrize(
    ("told", "usable", "expected"), [("3", 8, 3), ("0", 8, 7), ("4,2", 8, 7), (None, 2, 2), (None, 1, 1)]
)
def test_the_front_end_gets_a_core_where_there_are_more_than_two(
    told: str | None, usable: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_count, "cores", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert default_threads() == expected
