"""The cuts of every known ``tokenizer.ggml.pre`` give the token ids that llama.cpp gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.gguf_converter import write_gguf
from support.llama_cpp import ask
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.gguf.pre_tokenizers import SPLITS, pre_tokenizer

TEXTS = [
    "Hello, world! It's 2026 and we'll see 1234567.89% (or 3½) of IT'S, he'D, THEY'RE.",
    "  two  spaces\tand\ttabs \n\n\r\n  new lines\n   \n trailing   ",
    "def f(x):\n    return x**2 + y_1 - z/3  # comment\n\n\nclass A_b1: pass;;;\n",
    "naïve café cafe\u0301 Ärger ÉCOLE straße camelCase HTTPServer XMLHttp2Request",
    "中文字符和English混合2026年、日本語のテキスト、カタカナ。한국어 텍스트 ไทย हिन्दी العربية",
    "emoji 🙂🙂 👩‍👩‍👧 ™ © … “quoted” ‘single’ — dash €100 $5 £7 <|tag|> {a:1} [b]//path\\to`x`~",
    "ⅣⅤ ٣٤٥ ¹²³ 1 22 333 4444 55555 a1b2c3 v1.2.3 0x1F 10:30",
    "\u00a0nbsp\u3000wide \u200bzero x\r\ny\rz \n a",
    "https://example.com/a?b=c&d=e#f user@mail.org @@ ## !!! ??? ... 'quoted' 'S 'tis rock'n'roll",
]


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges that were learned without any cut, so that every cut that is missing shows."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1400, initial_alphabet=alphabet, show_progress=False, special_tokens=["<a>", "<b>", "<c>"]
    )
    parts = [text[start : start + size] for text in TEXTS for size in (2, 3, 5, 8) for start in range(len(text))]
    learner.train_from_iterator(parts, trainer)
    learned = json.loads(learner.to_str())["model"]
    return learned["vocab"], [tuple(merge) for merge in learned["merges"]]


def encoded(name: str, text: str) -> list[int]:
    tokens, merges = vocabulary()
    told = json.loads(Tokenizer(models.BPE(vocab=tokens, merges=merges)).to_str())
    told["pre_tokenizer"] = pre_tokenizer(name)
    found = Tokenizer.from_str(json.dumps(told))
    found.decoder = decoders.ByteLevel()
    ids: list[int] = found.encode(text, add_special_tokens=False).ids
    assert found.decode(ids) == text
    return ids


DIFFERENT = {
    **dict.fromkeys(("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), ("\u0301", "हिन्दी")),
    "kimi-k2": ("camelCase", "हिन्दी"),
    "deepseek-coder": ("\u3000",),
}
"""What llama.cpp cuts otherwise than the published ``tokenizer.json``: its own expressions leave out combining marks,
of Kimi K2 the borders of small and large letters too, and of DeepSeek Coder the ideographic space."""


def test_merges_cross_what_is_cut() -> None:
    assert len({json.dumps([encoded(name, text) for text in TEXTS]) for name in SPLITS}) >= 9


@pytest.mark.parametrize("name", SPLITS)
def test_token_ids_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    tokens, merges = vocabulary()
    random = np.random.default_rng(0)
    sizes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{key}.weight": size for key, size in sizes.items()}
    data = {key: (random.standard_normal(size, dtype=np.float32), "F32") for key, size in shapes.items()}
    keys = {"block_count": 1, "context_length": 512, "embedding_length": 32, "feed_forward_length": 32}
    keys |= {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        {f"llama.{key}": value for key, value in keys.items()},
        data,
        pre=name,
        learned=(sorted(tokens, key=tokens.__getitem__), [" ".join(merge) for merge in merges]),
    )
    texts = [text for text in TEXTS if not any(part in text for part in DIFFERENT.get(name, ()))]
    assert len(texts) > len(TEXTS) - 3
    assert ask(path, 0, texts) == [encoded(name, text) for text in texts]
