"""Tokens as bytes: those that llguidance reads in a tokenizer.json itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from llguidance import LLTokenizer, TokenizerWrapper
from support.tiny import EOS_ID, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.constraints.vocabulary import Vocabulary, token_bytes


def bytes_of_words() -> Tokenizer:
    """As GPT-2's: tokens in its alphabet, of bytes and of some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: rank for rank, token in enumerate([*alphabet, "th", "the", "Ġthe", "Ġt", "ĊĊ", "Ã©"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġ", "the"), ("Ċ", "Ċ"), ("Ã", "©")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def pieces() -> Tokenizer:
    """As Llama 2's: pieces of text and bytes, and a space before the first word."""
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *of_bytes, "▁", *"the", "▁t", "▁th", "he", "▁▁"]
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e"), ("▁", "▁")]
    model = models.BPE(
        {token: rank for rank, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {"bytes": bytes_of_words, "pieces": pieces, "tiny": tiny_tokenizer}
TEXTS = ["the", " the", "the the", "{", "a\n\nb", "日本é", "  the", "\x00\x02", "th e", "<0x41>"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def test_tokens_are_those_that_llguidance_reads(tokenizer: Tokenizer) -> None:
    theirs = LLTokenizer(tokenizer.to_str(), eos_token=[EOS_ID])
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = token_bytes(tokenizer, 0)
    assert len(found) == theirs.vocab_size
    for token_id, token in enumerate(found):
        # What begins with FF is a control token for llguidance, and decodes to nothing.
        if token_id not in special and token != b"\xff" and tokenizer.id_to_token(token_id) != "<unk>":
            assert theirs.decode_bytes([token_id]) == token


def vocabulary_of(tokenizer: Tokenizer, eos_id: int) -> Vocabulary:
    vocabulary = Vocabulary(tokenizer, 0, (eos_id,))
    vocabulary.in_longest_tokens = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=[eos_id]).greedy_tokenize
    return vocabulary


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_texts_are_read_as_llguidance_reads_them(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    eos_id = next(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    ids = vocabulary_of(tokenizer, eos_id)(text)
    theirs = LLTokenizer(tokenizer.to_str(), eos_token=[eos_id])
    assert ids == theirs.tokenize_str(text)
    assert theirs.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("text", ["<|end|>", "the<|end|>the", "<tool>"])
def test_no_text_becomes_a_control_token(text: str) -> None:
    tokenizer = bytes_of_words()
    controls = (tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<tool>"))
    vocabulary = Vocabulary(tokenizer, 0, controls)
    theirs = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(controls))
    vocabulary.in_longest_tokens = theirs.greedy_tokenize
    ids = vocabulary(text)
    assert not {*controls} & {*ids}
    assert b"".join(vocabulary.tokens[each] for each in ids) == text.encode()


def test_rows_without_a_token_have_no_bytes() -> None:
    found = token_bytes(bytes_of_words(), 300)
    assert len(found) == 300
    assert found[-1] == b""


def test_a_token_outside_the_alphabet_stands_for_itself() -> None:
    described = json.loads(bytes_of_words().to_str())
    described["model"]["vocab"]["日本"] = 400
    tokenizer = Tokenizer.from_str(json.dumps(described))
    assert token_bytes(tokenizer, 401)[400].decode() == tokenizer.decode([400]) == "日本"


def test_an_unknown_decoder_is_refused() -> None:
    described = json.loads(bytes_of_words().to_str())
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(ValueError, match="WordPiece"):
        token_bytes(Tokenizer.from_str(json.dumps(described)), 0)
    with pytest.raises(ValueError, match="no token is known to end"):
        Vocabulary(bytes_of_words(), 0, ())
