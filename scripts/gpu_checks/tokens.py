"""A tokenizer made from scratch: common words are one token each, and every id of the vocabulary has a text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.bench.prompts import WORDS

EOS = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", EOS)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, the common words, and fillers that no text encodes to but a random model writes."""
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trained = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2048), initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for number in range(len(vocab), vocab_size):
        vocab[f"Ġx{number}"] = number
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]]))
    tokenizer.add_special_tokens(special)
    return tokenizer


def save_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as published models have them."""
    make_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": EOS,
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
