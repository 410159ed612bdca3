"""The tokenizer of a GGUF file as a ``tokenizer.json``: transformers makes it, and what it gets wrong is put right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TokenizersBackend

from engine.gguf.header import Header, Unreadable
from engine.gguf.pre_tokenizers import SPLITS, pre_tokenizer

CONTROL_TOKEN = 3

SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""llama.cpp's keys for the sampling that a model's makers advise (gguf-py, constants.py), by their names in
``generation_config.json``."""


def require_known_tokenizer(header: Header) -> None:
    """Raises ``Unreadable`` for a way to cut text that is not known: a guess would make other tokens of it."""
    metadata = header.metadata
    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        raise Unreadable("its header has no tokenizer.ggml.tokens; use the model's safetensors folder")
    cut = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and cut not in SPLITS:
        raise Unreadable(
            f"tokenizer.ggml.pre is {cut!r}, and how that cuts text is not known; use the model's safetensors folder"
        )


def write_tokenizer(link: Path, header: Header) -> None:
    """Write ``tokenizer.json``, its configuration and the chat template into the folder of ``link``, the file's name.

    There must be nothing beside it: transformers would read what lies there in the place of what the file says.
    """
    tokenizer = TokenizersBackend.from_pretrained(str(link.parent), gguf_file=link.name)
    tokenizer.save_pretrained(link.parent)
    path = link.with_name("tokenizer.json")
    described = json.loads(path.read_text("utf-8"))
    repair_tokenizer(described, header.metadata)
    path.write_text(json.dumps(described, ensure_ascii=False), "utf-8")


def repair_tokenizer(described: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Correct, in the content of a ``tokenizer.json``, what transformers' conversion gets wrong."""
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        # transformers knows a few of these ways to cut and falls back to plain GPT-2, which keeps "2026" in one piece:
        # the merges then build tokens that the model has never seen there.
        described["pre_tokenizer"] = pre_tokenizer(metadata["tokenizer.ggml.pre"])
    cutter = described["pre_tokenizer"] or {}
    if cutter.get("type") == "Metaspace" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        # transformers reads this flag and never applies it: a prompt would begin with a space of its own.
        cutter["prepend_scheme"] = "never"
    mark_control_tokens(described, metadata)


def mark_control_tokens(described: dict[str, Any], metadata: dict[str, Any]) -> None:
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


def generation_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of ``generation_config.json``: the advised sampling, and the tokens that end an answer."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(token_id for token_id in named if token_id is not None))
    advised = {name: metadata[key] for key, name in SAMPLING.items() if key in metadata}
    return {**advised, **({"eos_token_id": ends} if ends else {})}
