"""Which decode steps are recorded; that replaying equals computing is shown in ``tests/interpreted``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paged import PagedModel
from support.tiny import tiny_model_folder

from engine.graphs import batch_sizes


def test_sizes_of_the_default() -> None:
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert len(batch_sizes(256)) < 25


@given(max_running=st.integers(1, 1000))
def test_every_number_of_sequences_has_a_size(max_running: int) -> None:
    sizes = batch_sizes(max_running)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_running
    for running in range(1, max_running + 1):
        size = next(size for size in sizes if size >= running)
        assert size - running <= (running - 1 if running <= 16 else size / 3)


def test_an_attention_that_cannot_be_recorded_is_left_alone(tmp_path: Path) -> None:
    model = PagedModel(tiny_model_folder(tmp_path))
    model.runner.record_decodes(0, lambda compute: pytest.fail("recorded"), lambda stage, done: None)
