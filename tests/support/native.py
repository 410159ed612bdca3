"""Models that are computed by the native forward, or not at all."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import TOLERANCE, PagedModel, apart, plain_logits, plain_model

from engine.api.engine import EngineConfig, ModelInfo
from engine.cache.kv_tensors import KVCache
from engine.model.loader import LoadedModel
from engine.native import library
from engine.native.build import native_runner
from engine.native.compiled import machine_code
from engine.native.compiled.shipped import INSTRUCTION_SETS
from engine.native.runner import NativeRunner

BLOCK_SIZE = 16


def compile_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is compiled once for all tests of this process."""
    cache = tmp_path_factory.getbasetemp() / "native"
    for place in ("engine.native.build", "engine.packed.folder"):
        monkeypatch.setattr(f"{place}.load_library", lambda _: library.load_library(cache))


SHIPPED = shlex.join(INSTRUCTION_SETS["x86_64"][-1].options)
TARGETS = ("-march=native", SHIPPED, "-march=x86-64")


def compile_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Code for one of ``TARGETS``, the fixture's parameter: that for lesser processors runs on better ones too."""
    if platform.machine() != "x86_64" and request.param != "-march=native":
        pytest.skip("the older processors are of the x86 family")
    monkeypatch.setattr(machine_code, "TARGETS", (tuple(shlex.split(request.param)),))
    return str(request.param)


class NativeModel(PagedModel):
    """Blocks begin with what must never be read. Raises ``NotNative`` for what is left to torch."""

    STALE = float("nan")
    folder: Path
    runner: NativeRunner

    def __init__(
        self,
        folder: Path,
        block_size: int = BLOCK_SIZE,
        change: Callable[[Any], object] = lambda module: None,
        max_context: int = 512,
    ) -> None:
        self.folder = folder
        super().__init__(folder, block_size=block_size, change=change, max_context=max_context)

    def make_runner(self, loaded: LoadedModel, cache: KVCache, info: ModelInfo) -> NativeRunner:
        torch.set_num_threads(2)
        try:
            return native_runner(loaded, cache, info, EngineConfig(path=str(self.folder)), lambda stage, done: None)
        finally:
            torch.set_num_threads(1)


def assert_equal(
    folder: Path, compared: list[list[int]], chunks: tuple[int, ...] = (2, 4, 9, 64), tolerance: float = TOLERANCE
) -> None:
    """Every mixture of chunks has the logits of a plain forward."""
    plain, native = plain_model(folder), NativeModel(folder)
    expected = [plain_logits(plain, text) for text in compared]
    for chunk in chunks:
        for found, logits in zip(native.run(compared, chunk), expected, strict=True):
            assert apart(found, logits) < tolerance
