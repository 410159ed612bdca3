"""Converts a GGUF file to a model folder, in a process of its own.

Run as ``python -m engine.weights.gguf_convert IN.gguf OUT_DIR``. It needs torch and, for a while, the memory of the
whole model in float32; both are gone when the process ends. Standard output carries lines ``progress FRACTION`` and,
where it fails, ``error SENTENCE``.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, TokenizersBackend
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from engine.api.errors import ModelRefused
from engine.api.units import size
from engine.device.machine_memory import total_bytes
from engine.failures import NOT_FAILURES, first_line
from engine.model.eligibility import require_eligible
from engine.model.refusals import advised
from engine.model.rehearsal import rehearse
from engine.weights.gguf_blocks import write_blocks

Metadata = dict[str, Any]
"""GGUF metadata by key, with the arrays of ``ARRAYS`` in full."""

ARRAYS = ("tokenizer.ggml.tokens",)
CONTROL_TOKEN = 3
FLOATS = frozenset(gguf.GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16"))

SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""llama.cpp's keys for the sampling that a model's makers advise (gguf-py, constants.py), by their names in
``generation_config.json``."""

# How llama.cpp splits text for these values of tokenizer.ggml.pre (llama-vocab.cpp), beyond the table of transformers:
# plain GPT-2, and GPT-2 after every digit has been split off.
GPT2_SPLITS = frozenset({"gpt-2", "phi-2", "jina-es", "jina-de", "olmo", "roberta-bpe"})
DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


# Far beyond any model: transformers makes lists of that length before it looks at a tensor.
LARGEST = {"block_count": 1000, "expert_count": 1 << 16}


class Unconvertible(ModelRefused):
    """The file would become a model that answers differently from the one it holds; the message says why."""


def convert(source: Path, target: Path) -> None:
    """Write config, float32 safetensors, tokenizer and chat template of ``source`` into the folder ``target``.

    Raises ``ModelRefused``, before any weight is read, for a model that cannot be served, and where transformers would
    drop something that changes what the model computes or reads.
    """
    config, metadata = read_header(source)
    require_servable(source, config)
    check_room(source, target)
    report(0.05)
    write_tokenizer(source, target, metadata)
    report(0.25)
    write_model(source, target, metadata)
    report(1.0)


def read_header(source: Path) -> tuple[Any, Metadata]:
    """The configuration of the model in a file, and its metadata, from the header alone. Raises ``Unconvertible``."""
    whole = whole_file(str(source))  # or it is refused here
    metadata, tensor_names = read_gguf_metadata(str(source), ARRAYS)
    check_convertible(metadata, tensor_names)
    kinds = {tensor.tensor_type for tensor in whole.tensors} - FLOATS
    if unknown := sorted(kind.name for kind in kinds if not can_unpack(kind)):
        raise Unconvertible(
            f"its weights are in {', '.join(unknown)}, which cannot be unpacked; take a file in Q4_0, Q8_0 or Q4_K_M"
        )
    try:
        config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        architecture = metadata["general.architecture"]
        raise Unconvertible(
            f"its architecture {architecture!r} is not read ({first_line(error)}); use the model's safetensors folder"
        ) from error
    config._attn_implementation = "eager"  # as of any other model that is only looked at
    return config, metadata


def require_servable(source: Path, config: Any) -> None:
    """Raises ``ModelRefused`` for a model that the engine would refuse after its weights are converted."""
    with advised(config):
        require_eligible(config)
    require_weights(source, config)
    rehearse(config)


def write_details(source: Path, target: Path, metadata: Metadata) -> None:
    """Write what the header says of the tokenizer, the chat template and the sampling; no weight is read."""
    write_tokenizer(source, target, metadata)
    (target / "generation_config.json").write_text("{}", "utf-8")
    write_sampling(target, metadata)


def can_unpack(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the library knows how blocks of a type become numbers."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def check_room(source: Path, target: Path) -> None:
    """Refuse a file whose weights in float32 are larger than the machine's memory or what is free on the disk."""
    count = sum(int(tensor.n_elements) for tensor in whole_file(str(source)).tensors)
    needed, memory, disk = 4 * count, total_bytes(), shutil.disk_usage(target).free
    if needed > memory:
        raise Unconvertible(
            f"its {count} weights take {size(needed)} of memory in float32 while it is converted, and this process may "
            f"use {size(memory)}; serve a smaller model, or this one from its safetensors in bfloat16"
        )
    if needed > disk:
        raise Unconvertible(
            f"its {count} weights take {size(needed)} on disk in float32, and {size(disk)} are free there; free some "
            "space or set another cache folder"
        )


def check_convertible(metadata: Metadata, tensor_names: tuple[str, ...]) -> None:
    """Refuse what transformers' reader silently ignores."""
    if any(name.startswith(("rope_freqs", "rope_factors")) for name in tensor_names):
        raise Unconvertible("its rotary scaling factors cannot be carried over; use the model's safetensors folder")
    architecture = metadata["general.architecture"]
    for name, largest in LARGEST.items():
        if (value := metadata.get(f"{architecture}.{name}", 0)) > largest:
            raise Unconvertible(f"its {architecture}.{name} is {value}; at most {largest} is converted")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise Unconvertible(
            f"its rotary scaling ({scaling}) cannot be carried over; use the model's safetensors folder"
        )
    cut = metadata.get("tokenizer.ggml.pre")
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and cut not in GGUF_PRE_TOKENIZER_SPLITS.keys() | GPT2_SPLITS | DIGIT_SPLITS:
        raise Unconvertible(
            f"tokenizer.ggml.pre is {cut!r}, and how that cuts text is not known; use the model's safetensors folder"
        )


def write_tokenizer(source: Path, target: Path, metadata: Metadata) -> None:
    """Write ``tokenizer.json`` as the metadata describes it, its configuration and the chat template."""
    tokenizer = TokenizersBackend.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(target)
    described = json.loads((target / "tokenizer.json").read_text("utf-8"))
    repair_tokenizer(described, metadata)
    (target / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), "utf-8")


def repair_tokenizer(described: dict[str, Any], metadata: Metadata) -> None:
    """Correct, in the content of a ``tokenizer.json``, what transformers' conversion gets wrong."""
    if metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITS:
        # transformers has no entry for these and falls back to plain GPT-2, which keeps "2026" in one piece: the
        # merges then build tokens that the model has never seen there.
        described["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, described["pre_tokenizer"]],
        }
    cutter = described["pre_tokenizer"] or {}
    if cutter.get("type") == "Metaspace" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        # transformers reads this flag and never applies it: a prompt would begin with a space of its own.
        cutter["prepend_scheme"] = "never"
    mark_control_tokens(described, metadata)


def mark_control_tokens(described: dict[str, Any], metadata: Metadata) -> None:
    """Make every control token of the file one special token, also where it holds characters such as ``｜``.

    A byte-level vocabulary spells tokens in its own alphabet, and transformers leaves out the control tokens that use
    any other character, so that the turn markers of some families would be cut into pieces.
    """
    known = {token["id"] for token in described["added_tokens"]}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", ())
    missing = {i: tokens[i] for i, kind in enumerate(types) if kind == CONTROL_TOKEN and i not in known}
    vocabulary = described["model"]["vocab"]
    if not missing or not isinstance(vocabulary, dict):
        return
    spelled = {token_id: token for token, token_id in vocabulary.items() if token_id in missing}
    for token_id, token in missing.items():
        vocabulary.pop(spelled.get(token_id), None)
        vocabulary[token] = token_id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        described["added_tokens"].append({"id": token_id, "content": token, **flags, "special": True})
    described["added_tokens"].sort(key=lambda token: token["id"])


def write_model(source: Path, target: Path, metadata: Metadata) -> None:
    """Write float32 safetensors, the blocks that they were unpacked from, and the configuration files."""
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    config = AutoConfig.from_pretrained(**place)
    reader = gguf.GGUFReader(str(source))
    report(0.4)
    model, loading = AutoModelForCausalLM.from_pretrained(
        **place,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        raise Unconvertible(f"it has no tensor for {', '.join(sorted(loading['missing_keys'])[:3])}")
    report(0.9)
    # The weights are plain floats now; with these marks save_pretrained refuses to write them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = end_ids(metadata)
    model.save_pretrained(target)
    write_sampling(target, metadata)
    write_blocks(reader, model, target)


def write_sampling(target: Path, metadata: Metadata) -> None:
    """Add the advised sampling to ``generation_config.json``; transformers' own writer refuses some combinations."""
    path = target / "generation_config.json"
    content = json.loads(path.read_text("utf-8"))
    content |= {name: metadata[key] for key, name in SAMPLING.items() if key in metadata}
    path.write_text(json.dumps(content, indent=2), "utf-8")


def require_weights(source: Path, config: Any) -> None:
    """Refuse a model that has more weights than the file holds: transformers would allocate the missing ones.

    If the file leaves out the output matrix, it is the embedding again, so up to twice as many are possible.
    """
    held = sum(int(tensor.n_elements) for tensor in whole_file(str(source)).tensors)
    with torch.device("meta"):
        described = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if described > 2 * held:
        raise Unconvertible(f"its metadata describe {described} weights, but it holds {held}")


def end_ids(metadata: Metadata) -> list[int]:
    """The tokens that end an answer: end of text, of turn and of message, where the file names them."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(token_id for token_id in named if token_id is not None))


def report(fraction: float) -> None:
    print(f"progress {fraction:.2f}", flush=True)


class PlainReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is read without its types
    """The reader that transformers uses, on a plain array: slicing a memmap object took half of its time.

    Raises ``Unconvertible`` where the file ends before something that it announces, metadata or the data of a tensor.
    """

    @property
    def data(self) -> Any:
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        """Numbers at an offset; the reader's own method returns fewer where the file ends."""
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self._plain):
            raise Unconvertible(
                f"the file is cut off or damaged: it should have at least {end} bytes and has {len(self._plain)}; "
                "copy or download it again"
            )
        return super()._get(offset, dtype, count, override_order)


whole_file = functools.cache(PlainReader)


def share_readers() -> None:
    """Let transformers parse the file and build its table of names only once, which it otherwise does repeatedly.

    Both are pure Python and took more than half of a conversion. This process reads one file.
    """
    gguf.GGUFReader = whole_file
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def main() -> int:
    """Convert; every failure becomes one line that the parent process shows to its user."""
    source, target = map(Path, sys.argv[1:])
    share_readers()
    try:
        convert(source, target)
    except NOT_FAILURES:
        raise
    except BaseException as error:  # noqa: BLE001 - the process main: any error of a broken file becomes one sentence
        print(f"error {' '.join(str(error).split()) or type(error).__name__}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
