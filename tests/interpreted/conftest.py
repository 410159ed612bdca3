"""Tests that run Triton's interpreter, started by ``tests/engine/test_triton.py`` in a process of their own.

Triton decides when it is imported whether kernels are interpreted, for the whole process.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
