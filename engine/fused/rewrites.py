"""The rewrites of our kernels, in their order: what a later one fuses, an earlier one may have made."""

from __future__ import annotations

from engine.fused.few_rows import SpeedFewRows
from engine.fused.heads import FuseHeads
from engine.fused.layers import FuseLayers
from engine.fused.mlp import FuseGatedMlps
from engine.fused.ops import FuseNorms, FuseRotations
from engine.model.rewrites import Rewrite

FUSED_OPS: tuple[Rewrite, ...] = (
    FuseNorms(),
    FuseRotations(),
    FuseGatedMlps(),
    FuseHeads(),
    FuseLayers(),
    SpeedFewRows(),
)
