"""Tiny models made from nothing: random weights, a byte-level tokenizer and a chat template in one prepared folder."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS)
EOS_ID = SPECIAL_TOKENS.index(EOS)
VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "head_dim": 8,
}
"""Of a dense DeepSeek V3 beside ``SMALL``; no two sizes alike, so that none can stand for another."""


def tiny_tokenizer() -> Tokenizer:
    """Three special tokens and the 256 bytes: every text round-trips, one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tiny_tokenizer(path: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": EOS,
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def tiny_model_folder(path: Path, model_type: str = "llama", **config: Any) -> Path:
    """Save a random float32 model with its tokenizer: the same arguments give the same weights. Returns ``path``.

    ``config`` overrides the small defaults. The vocabulary has 320 rows: ids from 259 on have no text.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    # Forked generator: a helper must not move the random state of the test that calls it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_config = CONFIG_MAPPING[model_type](**{**SMALL, **config})
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(path)
    save_tiny_tokenizer(path)
    return path


def endless_model_folder(path: Path, **config: Any) -> Path:
    """A tiny Llama that writes printable characters until its tokens are used up, however it is sampled."""
    from safetensors.torch import load_file, save_file

    tiny_model_folder(path, **config)
    weights = load_file(path / "model.safetensors")
    # One feature is large in every hidden state, whatever the layers add to it: through it the head has a bias.
    weights["model.embed_tokens.weight"][:, 0] = 10
    bias = weights["lm_head.weight"][:, 0]
    bias.fill_(-10)
    bias[tiny_tokenizer().encode(string.ascii_letters + string.digits).ids] = 0
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def light_model_folder(path: Path, real: Path) -> Path:
    """A random model that reads and writes what the model in the folder ``real`` does, in no time."""
    tiny_model_folder(path, vocab_size=49_152, num_hidden_layers=1, max_position_embeddings=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / name, path / name)
    return path
