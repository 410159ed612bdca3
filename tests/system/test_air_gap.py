"""A machine without any network: once the model is in the cache, the server starts and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ANSWERED = """
import json, socket, sys
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[2])
from support.server import running_server

body = {"contents": [{"parts": [{"text": "What is the capital of France?"}]}], "generationConfig": {"temperature": 0}}
with running_server(Path(sys.argv[1])) as server:
    answer = server.generate(body)
    print(json.dumps({"interfaces": socket.if_nameindex(), "code": answer.status_code, "body": answer.json()}))
"""


def test_the_second_start_needs_no_network(builtin_model: Path, tmp_path: Path) -> None:
    # Server and client are both in the namespace, which ends with the last of its processes.
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    command = [*alone, sys.executable, "-c", ANSWERED, str(tmp_path), json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert [name for _, name in told["interfaces"]] == ["lo"]
    assert told["code"] == 200, told["body"]
    assert "Paris" in told["body"]["candidates"][0]["content"]["parts"][0]["text"]
