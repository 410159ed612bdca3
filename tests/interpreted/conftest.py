"""Tests that run Triton's interpreter, started by ``tests/engine/attention/test_triton.py`` in a process of their own.

Triton decides when it is imported whether kernels are interpreted, for the whole process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(Path(__file__).parents[2] / "scripts"))
    from gpu_checks.stand_ins import mend_interpreter

    mend_interpreter()
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def models_as_they_were() -> Iterator[None]:
    """``engine.fused.ops`` replaces a function in the modules of models, which other tests compare with."""
    yield
    for module in list(sys.modules.values()):
        replaced = vars(module).get("apply_rotary_pos_emb") if module else None
        if hasattr(replaced, "castor_original"):
            vars(module)["apply_rotary_pos_emb"] = replaced.castor_original
