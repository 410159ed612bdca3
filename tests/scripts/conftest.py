"""``scripts/`` is on no path of its own: its package is imported as the scripts themselves do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
