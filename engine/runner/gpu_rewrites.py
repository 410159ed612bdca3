"""The rewrites of our kernels, in their order: what a later one fuses, an earlier one may have made."""

from __future__ import annotations

from engine.model.rewrites import Rewrite
from engine.runner.few_rows import SpeedFewRows
from engine.runner.fused_heads import FuseHeads
from engine.runner.fused_layers import FuseLayers
from engine.runner.fused_mlp import FuseGatedMlps
from engine.runner.fused_ops import FuseNorms, FuseRotations

FUSED_OPS: tuple[Rewrite, ...] = (
    FuseNorms(),
    FuseRotations(),
    FuseGatedMlps(),
    FuseHeads(),
    FuseLayers(),
    SpeedFewRows(),
)
