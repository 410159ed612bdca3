"""The random blocks of ``scripts/gpu_check``, for tests too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from gpu_checks.random_blocks import ALL, random_blocks

__all__ = ["ALL", "random_blocks"]
