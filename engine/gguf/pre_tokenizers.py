"""How a byte-level vocabulary of a GGUF file cuts text before its merges: by the value of ``tokenizer.ggml.pre``.

The values are llama.cpp's (llama-vocab.cpp, ``tokenizer_pre``). Each stands for the expressions of the published
``tokenizer.json``, applied one after the other: what matches is cut out, and so is what lies between.
"""

from __future__ import annotations

from typing import Any

from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
_LLAMA3 = GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
# Han characters stand alone: they are taken out of the classes of letters.
_UPPER, _LOWER = (rf"[\p{{{kind}}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kind in ("Lu}\\p{Lt", "Ll"))
_KIMI = (
    r"\p{Han}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    (_GPT2,): (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code"),
        *("gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "mpt", "olmo", "jais", "trillion"),
        *("granite-docling", "exaone4"),
    ),
    (r"\p{N}", _GPT2): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    (_QWEN2,): ("stablelm2", "hunyuan", "solar-open", "grok-2"),
    (_LLAMA3,): ("glm4", "chatglm-bpe"),
    _DEEPSEEK3: ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    _DEEPSEEK_CODER: ("deepseek-coder",),
    (_KIMI,): ("kimi-k2",),
    (_BAILING,): ("bailingmoe", "bailingmoe2", "llada-moe"),
    (_SEED_CODER,): ("seed-coder",),
}

SPLITS: dict[str, tuple[str, ...]] = {
    **{name: (expression,) for name, expression in GGUF_PRE_TOKENIZER_SPLITS.items()},
    **{name: expressions for expressions, names in _NAMES.items() for name in names},
}
"""The expressions, in the syntax of the tokenizers library (Oniguruma), by the value of ``tokenizer.ggml.pre``."""


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The part ``pre_tokenizer`` of a ``tokenizer.json``. Raises ``KeyError`` for a name that is not known."""
    cuts = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in SPLITS[name]
    ]
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*cuts, spelled]}
