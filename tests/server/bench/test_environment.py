"""What is told of the machine, and what is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import wait_until

from server.bench.environment import describe, public_command
from server.bench.usage import Usage, machine_cpu_seconds, process_tree, tree_cpu_seconds, tree_pss, tree_rss, watched

ROOT = Path(__file__).parents[3]


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTOR_API_KEYS", "secret-key")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["/home/somebody/.venv/bin/castor", "bench", "--api-key", "secret-key"]
    found = describe(command, {"castor": {"torch": "2.13.0"}}, ROOT)
    assert found["command"] == "castor bench --api-key ***"
    assert found["packages"] == {"castor": {"torch": "2.13.0"}}
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    for name in ("date", "cpu", "cores", "memory_bytes", "system", "python"):
        assert found[name], name
    text = json.dumps(found)
    for secret in ("secret-key", "somebody", socket.gethostname()):
        assert secret not in text


def test_the_commit_is_that_of_this_checkout_only() -> None:
    assert len(describe([], {}, ROOT)["commit"]) == 40
    inside = describe([], {}, ROOT / "server")  # as if it were installed below somebody else's repository
    assert (inside["commit"], inside["changed_files"]) == ("", 0)


@pytest.mark.parametrize(
    ("words", "public"),
    [
        (["castor", "bench", "--api-key=k", "--rounds", "1"], "castor bench --api-key=*** --rounds 1"),
        (["castor", "bench", "--output=/a/b/c", "~/d"], "castor bench --output=c d"),
        (["castor", "bench", "http://127.0.0.1:1"], "castor bench http://127.0.0.1:1"),
    ],
)
def test_a_command_without_keys_and_folders(words: list[str], public: str) -> None:
    assert public_command(words) == public


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="/proc tells memory on Linux only")
def test_the_memory_of_a_process_and_its_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(0, flush=True); input()'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"0\n"  # before, the child may be without memory of its own
            assert len(process_tree(parent.pid)) == 2
            with watched(parent.pid) as usage:
                pass
            alone = tree_rss(process_tree(parent.pid)[1])
        finally:
            parent.communicate(b"\n", timeout=30)
    assert usage.last_pss is not None
    assert usage.peak_rss is not None
    assert alone is not None
    assert 0 < usage.last_pss <= 1.1 * usage.peak_rss
    assert usage.peak_rss > alone > 1024 * 1024


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="/proc tells times on Linux only")
def test_who_takes_the_cores() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()\nwhile True: pass"], stdin=subprocess.PIPE) as busy:
        try:
            assert busy.stdin is not None
            with watched(busy.pid) as usage:
                busy.stdin.write(b"\n")
                busy.stdin.flush()
                before = tree_cpu_seconds(busy.pid)
                wait_until(lambda: (tree_cpu_seconds(busy.pid) or 0) >= (before or 0) + 0.2)
        finally:
            busy.kill()
    assert usage.server_cpu_seconds is not None
    assert usage.server_cpu_seconds >= 0.2
    assert usage.other_cores is not None
    assert usage.other_cores >= 0
    assert (machine_cpu_seconds() or 0) > usage.server_cpu_seconds


def test_what_cannot_be_seen_has_no_memory() -> None:
    with watched(None) as usage:
        pass
    assert usage == Usage()
    assert tree_rss(2**22 + os.getpid()) is tree_pss(2**22 + os.getpid()) is None
