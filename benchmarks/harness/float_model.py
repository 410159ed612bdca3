"""A prepared model as transformers reads it, with weights in float32: what peers and references compute with."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.weights.usable import GGUF_LINK


def float_model(folder: Path) -> Any:
    """The model of a prepared folder. A GGUF file is read by transformers' own code, and unpacked."""
    file = {} if any(folder.glob("*.safetensors")) else {"gguf_file": GGUF_LINK}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **file)
    return model.eval()


def float_folder(folder: Path, cache: Path) -> Path:
    """A folder of safetensors for programs that read nothing else: the prepared one, or one made of its GGUF file."""
    if any(folder.glob("*.safetensors")):
        return folder
    target = cache / "unpacked" / folder.name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = Path(work) / "made"
            model = float_model(folder)
            model.hf_quantizer = None  # with this mark it would not be saved
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(made)
            for path in folder.iterdir():
                if path.name != GGUF_LINK:
                    shutil.copy(path, made)
            os.replace(made, target)
    return target
