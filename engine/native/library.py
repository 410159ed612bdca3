"""The C code as a library, called through ctypes.

The structures mirror those of ``model.h``, ``matmul.h`` and ``states.h``, field by field.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

from engine.native.compiled.machine_code import load_code

PANEL = 16
"""Channels of a matrix that lie side by side, as in ``formats.h``."""


def _tensors(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_void_p) for name in names)


def _numbers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, c_int32) for name in names)


class Matrix(Structure):
    _fields_ = (
        ("panels", POINTER(c_void_p)),
        ("formats", POINTER(c_uint8)),
        ("bias", c_void_p),
        ("num_panels", c_int32),
        ("columns", c_int32),
    )


class Gate(Structure):
    _fields_ = (*_numbers("activation", "alternating"), ("steepness", c_float), ("limit", c_float))


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        ("gate", Gate),
        ("router", Matrix),
        *((name, POINTER(Matrix)) for name in ("experts_gate_up", "experts_down")),
        ("experts_gate", Gate),
        ("correction", c_void_p),
        *_numbers("num_experts", "num_chosen", "num_groups", "groups_chosen"),
        *_numbers("sigmoid", "shares_of_chosen", "gates_shared"),
        ("routed_scale", c_float),
        *_tensors("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm"),
        *_tensors("cosines", "sines", "sinks", "keys", "values"),
        *_numbers("pairs", "alternating", "whole_norms", "window", "group"),
        ("scaling", c_float),
        ("softcap", c_float),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        *_numbers("num_layers", "hidden", "intermediate", "heads", "kv_heads", "size", "block_size", "max_context"),
        *_numbers("num_experts", "num_chosen"),
        *((name, c_float) for name in ("eps", "embedding_scale", "branch_scale", "logit_scale", "logit_softcap")),
    )


class Batch(Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("wanted", c_int32),
        ("table_size", c_int32),
        *((name, c_void_p) for name in ("ids", "vectors", "positions", "tables", "table_starts", "rows", "logits")),
    )


class Delta(Structure):
    _fields_ = (
        *_tensors("query", "key", "value", "beta", "decay", "out", "states", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "heads", "key_heads", "key_size", "value_size", "by_channel"),
    )


class Mamba2(Structure):
    _fields_ = (
        *_tensors("x", "dt", "decay", "writing", "reading", "skip", "out", "states", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "heads", "groups", "size", "width"),
    )


class Convolution(Structure):
    _fields_ = (
        *_tensors("x", "weights", "bias", "out", "states", "starts", "lengths", "slots"),
        ("stride", c_int64),
        *_numbers("sequences", "channels", "taps"),
    )


def load_library(cache: Path | None) -> Any:
    """The C code, ready to be called; what had to be compiled is kept in ``cache``. Raises ``NotNative``."""
    library: Any = load_code(cache)
    library.castor_open.argtypes = [POINTER(Model), ctypes.c_int]
    library.castor_open.restype = c_void_p
    library.castor_close.argtypes = [c_void_p]
    library.castor_close.restype = None
    library.castor_forward.argtypes = [c_void_p, POINTER(Batch)]
    library.castor_forward.restype = ctypes.c_int
    library.castor_products_open.argtypes = [ctypes.c_int]
    library.castor_products_open.restype = c_void_p
    library.castor_products_close.argtypes = [c_void_p]
    library.castor_products_close.restype = None
    library.castor_product.argtypes = [c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_int32]
    library.castor_product.restype = ctypes.c_int
    library.castor_states_open.argtypes = [ctypes.c_int]
    library.castor_states_open.restype = c_void_p
    library.castor_states_close.argtypes = [c_void_p]
    library.castor_states_close.restype = None
    for name, step in (("delta", Delta), ("mamba2", Mamba2), ("convolution", Convolution)):
        function = getattr(library, f"castor_{name}")
        function.argtypes = [c_void_p, POINTER(step)]
        function.restype = None
    return library
