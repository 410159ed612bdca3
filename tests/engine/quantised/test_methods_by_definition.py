"""Readers against numpy code that was written from the definition of each format, on random stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.packed.schemes import Blocks
from engine.quantised import method_of, packing

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Parts = dict[str, torch.Tensor]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def fp8(*shape: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Random finite E4M3 numbers: sign, four bits of exponent with a bias of 7, three of mantissa."""
    raw = rng(seed).integers(0, 256, shape, dtype=np.uint8)
    raw[raw & 127 == 127] = 0  # no number
    sign, exponent, mantissa = 1.0 - 2.0 * (raw >> 7), (raw >> 3 & 15).astype(int), (raw & 7) / 8
    number = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7)) * sign
    return tensor(raw).view(torch.float8_e4m3fn), number.astype(np.float32)


def scales(*shape: int, seed: int = 9) -> np.ndarray:
    return rng(seed).uniform(0.01, 0.1, shape).astype(np.float32)


def spread(values: np.ndarray, high: int, wide: int, rows: int, columns: int) -> np.ndarray:
    return values.repeat(high, -2).repeat(wide, -1)[..., :rows, :columns]


def numbers(weight: Blocks | torch.Tensor) -> np.ndarray:
    return (weight.unpacked() if isinstance(weight, Blocks) else weight).numpy()


def scheme_of(weight: Blocks | torch.Tensor) -> str | None:
    return weight.scheme.name if isinstance(weight, Blocks) else None


def same(found: Blocks | torch.Tensor, expected: np.ndarray, scheme: str | None) -> None:
    assert scheme_of(found) == scheme
    assert np.array_equal(numbers(found), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "block", "scheme"),
    [
        (256, 256, (128, 128), "F8_128"),
        (100, 384, (128, 128), "F8_128"),  # the last rows of a block are missing
        (70, 160, (128, 128), "F8_32"),  # the last block of columns is cut
        (64, 96, (32, 32), "F8_32"),
        (16, 96, (16, 96), "F8_32"),
        (16, 40, (16, 40), None),
        (16, 64, (1, 16), None),
    ],
)
def test_fp8_in_blocks(rows: int, columns: int, block: tuple[int, int], scheme: str | None) -> None:
    weight, known = fp8(rows, columns)
    scale = scales(-(-rows // block[0]), -(-columns // block[1]))
    method = method_of({"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"})
    found = method.read({"weight": weight, "scale": tensor(scale)})
    same(found, known * spread(scale, *block, rows, columns), scheme)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale_for_all(shape: tuple[int, ...]) -> None:
    weight, known = fp8(8, 128)
    found = method_of({"quant_method": "fp8"}).read({"weight": weight, "scale": torch.full(shape, 0.3)})
    same(found, known * np.float32(0.3), "F8_128")


def test_fp8_scales_that_are_powers_of_two() -> None:
    """In bytes, as float8_e8m0fnu and as the bytes themselves."""
    weight, known = fp8(8, 64)
    raw = rng(1).integers(100, 140, (8, 2), dtype=np.uint8)
    expected = known * (2.0 ** (raw.astype(np.float32) - 127)).repeat(32, 1)
    for settings in ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, {"quant_method": "mxfp8"}):
        method = method_of({**settings, "weight_block_size": [1, 32]})
        for stored in (tensor(raw), tensor(raw).view(torch.float8_e8m0fnu)):
            same(method.read({"weight": weight, "scale": stored}), expected, "F8_32")


def test_stacked_fp8_experts() -> None:
    """Blocks of rows do not go on from one expert to the next."""
    weight, known = fp8(3, 40, 128)
    scale = scales(3, 2, 1)
    method = method_of({"quant_method": "fp8", "weight_block_size": [32, 128]})
    found = method.read({"weight": weight, "scale": tensor(scale)})
    assert isinstance(found, Blocks)
    assert found.shape == (3, 40, 128)
    same(found, known * spread(scale, 32, 128, 40, 128), "F8_128")
    one = scales(3)
    same(method.read({"weight": weight, "scale": tensor(one)}), known * one[:, None, None], "F8_128")


def test_experts_in_fp4_beside_fp8() -> None:
    raw = rng(2).integers(0, 256, (8, 32), dtype=np.uint8)
    powers = rng(3).integers(120, 130, (8, 2), dtype=np.uint8)
    method = method_of({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"})
    found = method.read({"weight": tensor(raw).view(torch.int8), "scale": tensor(powers).view(torch.float8_e8m0fnu)})
    expected = FP4[np.stack([raw & 15, raw >> 4], -1).reshape(8, 64)]
    same(found, expected * (2.0 ** (powers.astype(np.float32) - 127)).repeat(32, 1), "MXFP4")


def test_fbgemm_rows_and_experts_that_lie_the_other_way_round() -> None:
    method = method_of({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    weight, known = fp8(8, 256)
    scale = scales(8, 1)
    same(method.read({"weight": weight, "scale": tensor(scale)}), known * scale, "F8_128")
    experts, known = fp8(2, 128, 6)
    scale = scales(2, 1, 6)
    same(method.read({"weight": experts, "scale": tensor(scale)}), (known * scale).swapaxes(1, 2), "F8_128")


def test_mxfp4_of_gpt_oss_is_what_ggml_has_in_another_order() -> None:
    raw = rng(4).integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    powers = rng(5).integers(0, 255, (2, 6, 3), dtype=np.uint8)
    found = method_of({"quant_method": "mxfp4"}).read({"blocks": tensor(raw), "scales": tensor(powers)})
    digits = np.stack([raw & 15, raw >> 4], -1).reshape(2, 6, 3, 32)
    expected = FP4[digits] * (2.0 ** (powers.astype(np.float64) - 127)).astype(np.float32)[..., None]
    same(found, expected.reshape(2, 6, 96), "MXFP4")
    assert isinstance(found, Blocks)
    by_gguf = gguf.dequantize(found.data.numpy().reshape(12, -1), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(by_gguf.reshape(2, 6, 96), expected.reshape(2, 6, 96))


def test_mxfp4_blocks_that_gguf_wrote() -> None:
    """Written by gguf, brought into the published order, and back."""
    written = gguf.quantize(rng(6).standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.MXFP4)
    blocks = written.reshape(4, 2, 17)
    nibbles = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1)
    published = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    found = method_of({"quant_method": "mxfp4"}).read({"blocks": tensor(published), "scales": tensor(blocks[..., 0])})
    assert isinstance(found, Blocks)
    assert np.array_equal(found.data.numpy(), written)


@pytest.mark.parametrize(("columns", "scheme"), [(128, "NVFP4"), (64, "NVFP4"), (48, None)])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_nvfp4_of_modelopt(columns: int, scheme: str | None, stack: tuple[int, ...]) -> None:
    raw = rng(7).integers(0, 256, (*stack, 8, columns // 2), dtype=np.uint8)
    scale, known = fp8(*stack, 8, columns // 16, seed=8)
    whole = scales(*stack, *[1] * (2 * len(stack)))
    found = method_of({"quant_method": "modelopt", "quant_algo": "NVFP4"}).read(
        {"weight": tensor(raw), "scale": scale, "whole": tensor(whole)}
    )
    expected = FP4[np.stack([raw & 15, raw >> 4], -1).reshape(*stack, 8, columns)]
    same(found, expected * (known * whole).repeat(16, -1), scheme)


@pytest.mark.parametrize("shape", [(), (8,), (8, 1), (1, 1, 2, 1)])
def test_fp8_of_modelopt(shape: tuple[int, ...]) -> None:
    """One scale, one for each row, one for each block of 128 x 128."""
    weight, known = fp8(8, 256)
    scale = scales(*shape)
    of_all = {(): (8, 256), (8,): (1, 256), (8, 1): (1, 256), (1, 1, 2, 1): (8, 128)}[shape]
    expected = known * spread(scale.reshape(8 // of_all[0], 256 // of_all[1]), *of_all, 8, 256)
    found = method_of({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}).read(
        {"weight": weight, "scale": tensor(scale)}
    )
    same(found, expected, "F8_128")


def stream(digits: np.ndarray, bits: int) -> np.ndarray:
    """Digits [rows, columns] as words [rows, words], bit by bit, the lowest first."""
    each = (digits[..., None].astype(np.int64) >> np.arange(bits) & 1).reshape(len(digits), -1).astype(np.uint8)
    padded = np.pad(each, ((0, 0), (0, -each.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_gptq(bits: int, layout: str, is_ordered: bool) -> None:
    inputs, outputs, size = 128, 32, 32
    digits = rng(bits).integers(0, 1 << bits, (outputs, inputs))
    zero = rng(bits + 10).integers(0, 1 << bits, (outputs, inputs // size))
    scale = scales(outputs, inputs // size).astype(np.float16)
    group = np.arange(inputs) // size
    group = group if is_ordered else rng(bits + 20).permutation(group)
    less = zero - (layout == "gptq") & (1 << bits) - 1
    parts = {
        "qweight": tensor(stream(digits, bits).T),
        "qzeros": tensor(stream(less.T, bits)),
        "scales": tensor(scale.T),
        "g_idx": tensor(group.astype(np.int32)),
    }
    method = method_of({"quant_method": "gptq", "bits": bits, "checkpoint_format": layout, "desc_act": not is_ordered})
    found = method.read(parts)
    expected = (digits - zero[:, group]).astype(np.float32) * scale.astype(np.float32)[:, group]
    same(found, expected, "I8_32" if bits == 8 else "I4_32")
    assert isinstance(found, Blocks)
    assert (found.order is None) == is_ordered


def test_gptq_whose_last_group_is_shorter() -> None:
    digits = rng().integers(0, 16, (8, 96))
    scale, group = scales(8, 2), np.arange(96) // 64
    parts = {
        "qweight": tensor(stream(digits, 4).T),
        "qzeros": tensor(stream(np.full((2, 8), 7), 4)),
        "scales": tensor(scale.T),
    }
    method = method_of({"quant_method": "gptq", "bits": 4})
    found = method.read({**parts, "g_idx": tensor(group)})
    same(found, (digits - 8).astype(np.float32) * scale[:, group], "I4_32")


@pytest.mark.parametrize(("size", "scheme"), [(16, None), (32, "I4_32"), (64, "I4_32"), (128, "I4_128")])
def test_awq(size: int, scheme: str | None) -> None:
    inputs, outputs = 128, 16
    digits, zero = rng(1).integers(0, 16, (inputs, outputs)), rng(2).integers(0, 16, (inputs // size, outputs))
    scale = scales(inputs // size, outputs)
    places = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(some: np.ndarray) -> torch.Tensor:
        return tensor(stream(some.reshape(len(some), -1, 8)[..., places].reshape(len(some), -1), 4))

    found = method_of({"quant_method": "awq", "bits": 4, "group_size": size, "version": "GEMM"}).read(
        {"qweight": interleaved(digits), "qzeros": interleaved(zero), "scales": tensor(scale)}
    )
    same(found, ((digits - zero.repeat(size, 0)).astype(np.float32) * scale.repeat(size, 0)).T, scheme)


def test_compressed_tensors_with_inputs_out_of_order() -> None:
    digits, scale = rng(1).integers(0, 16, (8, 64)), scales(8, 2)
    group = rng(2).permutation(np.arange(64) // 32)
    parts = {
        "packed": tensor(stream(digits, 4)),
        "scale": tensor(scale),
        "shape": torch.tensor([8, 64]),
        "g_idx": tensor(group),
    }
    method = method_of(compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"))
    same(method.read(parts), (digits - 8).astype(np.float32) * scale[:, group], "I4_32")
    unset = {**parts, "g_idx": torch.full((64,), -1)}
    same(method.read(unset), (digits - 8).astype(np.float32) * scale.repeat(32, 1), "I4_32")


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def test_compressed_tensors_of_two_schemes() -> None:
    """Each weight says by its parts which scheme it has."""
    settings = compressed("mixed-precision", num_bits=4, type="int", strategy="group", group_size=32)
    settings["config_groups"]["group_0"]["format"] = "pack-quantized"
    settings["config_groups"]["group_1"] = {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    method = method_of(settings)
    digits, scale = rng(1).integers(0, 16, (8, 64)), scales(8, 2)
    parts = {"packed": tensor(stream(digits, 4)), "scale": tensor(scale), "shape": torch.tensor([8, 64])}
    same(method.read(parts), (digits - 8).astype(np.float32) * scale.repeat(32, 1), "I4_32")
    weight, known = fp8(8, 64)
    same(method.read({"weight": weight, "scale": tensor(scale[:, :1])}), known * scale[:, :1], "F8_32")


def test_zeros_that_no_block_holds() -> None:
    """int8 digits and a zero that is no integer stay numbers."""
    digits, scale = rng(1).integers(-128, 128, (8, 64), dtype=np.int8), scales(8, 2)
    zero = scale * 100
    quant_type = {"default": {"_type": "IntxWeightOnlyConfig", "_data": {}}}
    found = method_of({"quant_method": "torchao", "quant_type": quant_type}).read(
        {"qdata": tensor(digits), "scale": tensor(scale), "zeros": tensor(zero)}
    )
    same(found, (digits.astype(np.float32) - zero.repeat(32, 1)) * scale.repeat(32, 1), None)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_int4_of_torchao(stack: tuple[int, ...]) -> None:
    """Int4Tensor: pairs of signed digits, times a scale, plus a least number; scales lie the other way round."""
    digits = rng(1).integers(-8, 8, (*stack, 8, 64))
    scale, zero = scales(*stack, 2, 8), scales(*stack, 2, 8, seed=3)
    pairs = (digits[..., ::2] & 15 | (digits[..., 1::2] & 15) << 4).astype(np.uint8)
    data = {"int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PLAIN"}}
    quant_type = {"default": {"_type": "Int4WeightOnlyConfig", "_data": data}}
    found = method_of({"quant_method": "torchao", "quant_type": quant_type}).read(
        {"qdata": tensor(pairs).view(torch.int8), "scale": tensor(scale), "zeros": tensor(zero)}
    )
    each = [one.swapaxes(-1, -2).repeat(32, -1) for one in (scale, zero)]
    same(found, digits.astype(np.float32) * each[0] + each[1], None)


def test_a_weight_is_made_a_run_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks, also where runs end within an expert."""
    cases: list[tuple[Mapping[str, Any], Callable[[], Parts]]] = [
        (
            {"quant_method": "fp8", "weight_block_size": [8, 64]},
            lambda: {"weight": fp8(3, 20, 64)[0], "scale": tensor(scales(3, 3, 1))},
        ),
        (
            {"quant_method": "awq"},
            lambda: {
                "qweight": tensor(rng(1).integers(-9, 9, (64, 5), dtype=np.int32)),
                "qzeros": tensor(rng(2).integers(-9, 9, (2, 5), dtype=np.int32)),
                "scales": tensor(scales(2, 40)),
            },
        ),
        (
            {"quant_method": "mxfp4"},
            lambda: {
                "blocks": tensor(rng(1).integers(0, 256, (3, 20, 2, 16), dtype=np.uint8)),
                "scales": tensor(rng(2).integers(0, 255, (3, 20, 2), dtype=np.uint8)),
            },
        ),
    ]
    for settings, parts in cases:
        method = method_of(dict(settings))
        whole = method.read(parts())
        with monkeypatch.context() as patch:
            patch.setattr(packing, "CHUNK", 64)
            found = method.read(parts())
        assert isinstance(found, Blocks)
        assert isinstance(whole, Blocks)
        assert torch.equal(found.data, whole.data)
        assert found.scheme is whole.scheme
