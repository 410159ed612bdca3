"""What the dry run refuses of models whose attention goes through the interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fates import lively_class_folder

from engine.api.engine import EngineConfig
from engine.api.errors import ModelRefused
from engine.model.loader import load_model


def test_positions_that_do_not_count_from_0_are_refused(tmp_path: Path) -> None:
    """The first token of Kosmos-2.5 is at position 2, after that of padding; at 0 it would compute other numbers."""
    lively_class_folder(tmp_path, "Kosmos2_5ForConditionalGeneration")
    with pytest.raises(
        ModelRefused, match=r"layer text_model.*self_attn does not count the positions of a text from 0"
    ):
        load_model(EngineConfig(path=str(tmp_path), device="cpu"), lambda stage, done: None)
