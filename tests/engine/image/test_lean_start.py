"""A second start from the image that the first one kept: the same answers without torch, or the first start's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_converter import converted, quantised, vocabulary, write_gguf
from support.gguf_families import FAMILIES

from engine.api.engine import EngineConfig
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.build import build_core
from engine.core.core import Core
from engine.gguf.prepare import prepare
from engine.image import image_file
from engine.image.image_file import image_path, read_image, write_image
from engine.image.keep import PANELS
from engine.image.start import runner_of_image

PROMPT = tuple(3 + number * 7 % 90 for number in range(40))
GRAMMAR = 'start: /[A-Z]{2}/ "."'
REQUESTS = [
    Request("greedy", PROMPT, SamplingParams(6, temperature=0.0, logprobs=5)),
    Request("again", PROMPT, SamplingParams(4, temperature=0.0, presence_penalty=0.5)),
    Request("drawn", PROMPT[:9], SamplingParams(6, seed=4, top_p=0.9, logprobs=2), candidates=2),
    Request("led", PROMPT[:5], SamplingParams(8, seed=1, grammar=GRAMMAR)),
]
CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from engine.api.engine import EngineConfig
from engine.build import build_core
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
config = EngineConfig(**json.loads(sys.argv[1]))
core = build_core(config, lambda stage, done: None)
core.submit(Request("greedy", tuple(json.loads(sys.argv[3])), SamplingParams(6, temperature=0.0, logprobs=5)))
deltas = []
while core.has_work:
    for events in core.step():
        deltas += [delta.token_ids for delta in events.deltas]
core.close()
heavy = {"torch", "transformers", "accelerate", "safetensors", "gguf", "sympy"}
print(json.dumps([deltas, sorted(heavy & sys.modules.keys())]))
"""


def prepared(place: Path, name: str) -> Path:
    family = FAMILIES[name]
    keys, tensors = converted(family.model(), family.architecture, family.keys, family.change)
    # Beside matrices in blocks, some that are packed as floats in memory.
    data = quantised(tensors, {"attn_q|attn_o|embd|exps": "Q8_0", "(gate|up).weight": "Q4_0"})
    learned = vocabulary(len(data["token_embd.weight"][0])), ["! !"]
    source = write_gguf(place / "m.gguf", family.architecture, keys, data, learned=learned)
    (place / "model").mkdir()
    prepare(source, place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled code is, once for all tests of this process."""
    (tmp_path_factory.getbasetemp() / "native").mkdir(mode=0o700, exist_ok=True)
    return tmp_path_factory.getbasetemp() / "native"


def started(config: EngineConfig) -> tuple[Core, bool]:
    """The core, and whether that took torch; what it keeps is kept."""
    stages: list[str] = []
    threads = torch.get_num_threads()
    core = build_core(config, lambda stage, _done: stages.append(stage))
    torch.set_num_threads(threads)
    for thread in threading.enumerate():
        if thread.name == "keep-model":
            thread.join()
    return core, "importing torch" in stages


def answers(core: Core) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for request in REQUESTS:
        core.submit(request)
        while core.has_work:
            for events in core.step():
                told.setdefault(request.id, []).extend(
                    (delta.candidate, delta.token_ids, delta.logprobs) for delta in events.deltas
                )
                if events.done:
                    told[request.id].append(events.done)
    core.check()
    core.close()
    return told


def config_in(place: Path, folder: Path, native: Path, **settings: Any) -> EngineConfig:
    cache = place / "cache"
    cache.mkdir(exist_ok=True)
    if not (cache / "native").exists():
        (cache / "native").symlink_to(native)
    given = {"device": "cpu", "threads": 1, "kv_memory": 8e6, "max_context": 128, **settings}
    return EngineConfig(str(folder), cache_dir=str(cache), **given)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_a_second_start_answers_alike(tmp_path: Path, native: Path, name: str) -> None:
    config = config_in(tmp_path, prepared(tmp_path, name), native)
    core, by_torch = started(config)
    assert by_torch
    first, info = answers(core), core.info
    core, by_torch = started(config)
    assert not by_torch
    assert core.info == info
    assert answers(core) == first
    assert first["again"][-1].cached_tokens > 0
    assert first["led"][-1].error is None


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, native: Path) -> tuple[EngineConfig, list[Any]]:
    """A model with an image, and what it answers to the first request."""
    place = tmp_path_factory.mktemp("kept")
    config = config_in(place, prepared(place, "llama"), native)
    core, _ = started(config)
    return config, answers(core)["greedy"]


@pytest.fixture
def image(kept: tuple[EngineConfig, list[Any]]) -> Iterator[Path]:
    """The path of the image, whose bytes and times are put back."""
    path = image_path(kept[0])
    assert path is not None
    before, times = path.read_bytes(), path.stat()
    yield path
    path.write_bytes(before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def is_lean(config: EngineConfig) -> bool:
    return runner_of_image(config, lambda stage, done: None) is not None


def test_its_process_has_neither_torch_nor_transformers(kept: tuple[EngineConfig, list[Any]]) -> None:
    config, told = kept
    given = {"path": config.path, "cache_dir": config.cache_dir, "device": "cpu", "threads": 1, "kv_memory": 8e6}
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            json.dumps({**given, "max_context": 128}),
            str(Path(image_file.engine.__file__).parents[1]),
            json.dumps(PROMPT),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    deltas, heavy = json.loads(child.stdout)
    assert heavy == []
    assert deltas == [list(tokens) for _, tokens, _ in told[:-1]]


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 32}, {"max_context": 64}, {"dtype": "bfloat16"}, {"device": "cuda"}, {"native": False}],
    ids=str,
)
def test_other_settings_have_no_image(kept: tuple[EngineConfig, list[Any]], settings: dict[str, Any]) -> None:
    config, _ = kept
    assert not is_lean(replace(config, **settings))
    assert is_lean(config)


def test_what_a_start_may_choose_needs_no_other_image(kept: tuple[EngineConfig, list[Any]]) -> None:
    config, _ = kept
    chosen = replace(config, threads=2, kv_memory=4e4, max_running=3)
    runner = runner_of_image(chosen, lambda stage, done: None)
    assert runner is not None
    assert runner.info.max_running == 3
    assert 16 <= runner.info.max_context < 128


@pytest.mark.parametrize("what", ["weights", "panels", "folder", "version", "code", "visible"])
def test_what_has_changed_has_no_image(
    kept: tuple[EngineConfig, list[Any]], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = kept
    places = {
        "weights": Path(config.path) / "weights.gguf",
        "panels": next((Path(str(config.cache_dir)) / "panels").glob("*.panels")),
        "folder": Path(config.path) / "config.json",
    }
    assert is_lean(config)
    if what in places:
        path = places[what].resolve()
        times = path.stat()
        os.utime(path, ns=(1, 1))
        assert not is_lean(config)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "visible":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert not is_lean(config)
    else:
        monkeypatch.setattr(image_file, what if what == "version" else "_code", lambda *_names: "another")
        assert not is_lean(config)


@pytest.mark.parametrize("damage", ["byte", "pointer", "end", "short", "empty", "open"])
def test_a_damaged_image_is_not_used(kept: tuple[EngineConfig, list[Any]], image: Path, damage: str) -> None:
    config, _ = kept
    whole = image.read_bytes()
    found = read_image(image)
    assert found is not None
    places = {"byte": 5, "pointer": found.facts["length"] + 9, "end": len(whole) - 1}
    if damage in places:
        changed = bytearray(whole)
        changed[places[damage]] ^= 1
        image.write_bytes(changed)
    elif damage == "open":
        image.chmod(0o622)
    else:
        image.write_bytes(whole[:-100] if damage == "short" else b"")
    assert not is_lean(config)
    image.chmod(0o600)


def test_an_image_that_computes_other_numbers_is_not_used(
    kept: tuple[EngineConfig, list[Any]], image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = kept
    found = read_image(image)
    assert found is not None
    pointers = found.pointers.copy()
    panels = np.flatnonzero(pointers[:, 1] == PANELS)
    pointers[panels[:2], 2] = pointers[panels[1::-1], 2]  # two panels of one matrix in each other's place
    write_image(image, [found.data.tobytes()], pointers, found.facts)
    assert not is_lean(config)
    assert "computes other numbers than the model did" in caplog.text


def test_weights_beyond_the_digest_are_checked_by_what_they_compute(
    kept: tuple[EngineConfig, list[Any]], image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = kept
    found = read_image(image)
    assert found is not None
    data = found.data.tobytes()
    monkeypatch.setattr(image_file, "_DIGESTED", len(data) // 2)
    half = len(data) // 2 // 64 * 64
    write_image(image, [data[:half], data[half:]], found.pointers, found.facts)
    assert is_lean(config)
    changed = bytearray(image.read_bytes())
    changed[half : len(data)] = bytes(len(data) - half)
    image.write_bytes(changed)
    assert read_image(image) is not None
    assert not is_lean(config)
    assert "computes other numbers than the model did" in caplog.text


def test_more_memory_than_the_image_has_angles_for_takes_a_new_one(tmp_path: Path, native: Path) -> None:
    folder = prepared(tmp_path, "llama")
    small, large = (config_in(tmp_path, folder, native, kv_memory=size) for size in (4e4, 8e6))
    core, _ = started(small)
    assert core.info.max_context < 128
    assert is_lean(small)
    core, by_torch = started(large)
    assert by_torch
    assert core.info.max_context == 128
    assert is_lean(large)


def test_images_of_models_that_are_gone_are_deleted(kept: tuple[EngineConfig, list[Any]], image: Path) -> None:
    found = read_image(image)
    assert found is not None
    gone = {**found.facts, "sources": [["/nonexistent/weights.gguf", 1, 1]]}
    other = image.with_name("0123456789abcdef.image")
    write_image(other, [found.data.tobytes()], found.pointers, gone)
    left = image.with_name(f"{image.stem}.x7.new")  # of a start that was ended
    left.touch()
    write_image(image, [found.data.tobytes()], found.pointers, found.facts)
    assert not other.exists()
    assert not left.exists()
    assert image.exists()
