"""Small models as they are published with quantised weights, and the same models with the numbers of these weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny import SMALL, save_tiny_tokenizer, tiny_model_folder

HIGH, WIDE = 64, 32
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [HIGH, WIDE]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128},
    "qwen3_vl_moe": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [0],
    },
}


def saved_small(folder: Path, model_type: str, **settings: Any) -> Path:
    """A small random model in float32, with matrices of whole blocks; of a composite, with a tower."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    if model_type not in TOWERS:
        return tiny_model_folder(folder, model_type, **{**SIZES, **settings})
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    text = {**SMALL, **SIZES, "rope_parameters": rope, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[model_type](
            text_config=text, vision_config=TOWERS[model_type], image_token_id=300, video_token_id=301
        )
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def published_fp8(folder: Path, kept: str = r"norm|embed|lm_head|\.gate\.|bias|visual|vision") -> Path:
    """Make a folder of float weights one of FP8 in blocks, the rest in bfloat16. Returns one with their numbers."""
    published: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or re.search(kept, name):
            published[name] = weight.bfloat16()
            numbers[name] = published[name].float()
            continue
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // HIGH) * HIGH, -(-columns // WIDE) * WIDE)
        padded[:rows, :columns] = weight
        scales = padded.unflatten(0, (-1, HIGH)).unflatten(2, (-1, WIDE)).abs().amax(dim=(1, 3)) / 448
        wide = scales.repeat_interleave(HIGH, 0).repeat_interleave(WIDE, 1)[:rows, :columns]
        published[name] = (weight / wide).to(torch.float8_e4m3fn)
        published[f"{name}_scale_inv"] = scales
        numbers[name] = published[name].float() * wide
    return _written(folder, published, numbers, FP8)


def published_mxfp4(folder: Path) -> Path:
    """Make a folder of a gpt-oss one with MXFP4 experts, the rest in bfloat16. Returns one with their numbers."""
    published: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            published[name] = weight.bfloat16()
            numbers[name] = published[name].float()
            continue
        rows = weight.mT  # [experts, outputs, columns]
        groups = rows.unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-20, 20)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        digits = (groups / exponents.exp2()[..., None])[..., None].sub(table).abs().argmin(-1)
        numbers[name] = (table[digits] * exponents.exp2()[..., None]).flatten(-2).mT.contiguous()
        published[f"{name}_blocks"] = (digits[..., ::2] | digits[..., 1::2] << 4).to(torch.uint8)
        published[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return _written(folder, published, numbers, MXFP4)


def _written(
    folder: Path, published: dict[str, torch.Tensor], numbers: dict[str, torch.Tensor], settings: dict[str, Any]
) -> Path:
    unpacked = folder.with_name(f"{folder.name}-unpacked")
    shutil.copytree(folder, unpacked)
    save_file(
        {name: weight.contiguous() for name, weight in numbers.items()},
        unpacked / "model.safetensors",
        {"format": "pt"},
    )
    save_file(
        {name: weight.contiguous() for name, weight in published.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    edit_config(folder, dtype="bfloat16", quantization_config=settings)
    return unpacked


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
