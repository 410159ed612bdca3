"""Streamed text equals the whole decode, for byte-level and byte-fallback tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.tiny import EOS_ID, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from engine.text.detokenizer import MAX_PENDING, Detokenizer, TokenTexts, hidden_ids


def sentencepiece_tokenizer() -> Tokenizer:
    """Words with a leading marker of the space, bytes as fallback, and a decoder that drops the first space."""
    pieces = ["<s>", "▁", *"abcdé日", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "ab", "▁ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return tokenizer


BYTE_LEVEL = tiny_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
tokenizers_of_both_kinds = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])


def stream(tokenizer: Tokenizer, token_ids: list[int], markers: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = Detokenizer(TokenTexts(tokenizer), hidden_ids(tokenizer, markers))
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


@tokenizers_of_both_kinds
@settings(max_examples=examples(80))
@given(st.text(alphabet=st.sampled_from(" ab\n\x7fé߷日\u200d\u0301👩👧𝔘")))
def test_pieces_add_up_to_the_whole_decode(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert "\ufffd" not in "".join(pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    token_ids = BYTE_LEVEL.encode("a👍b", add_special_tokens=False).ids
    assert stream(BYTE_LEVEL, token_ids) == ["a", "", "", "", "👍", "b", ""]


def test_the_first_space_is_dropped_as_in_a_whole_decode_and_no_other() -> None:
    token_ids = [SENTENCEPIECE.token_to_id(piece) for piece in ["▁ab", "▁a", "b", "▁b"]]
    assert stream(SENTENCEPIECE, token_ids) == ["ab", " a", "b", " b", ""]


def test_an_incomplete_character_at_the_end_reads_as_a_whole_decode_does() -> None:
    token_ids = BYTE_LEVEL.encode("a👍", add_special_tokens=False).ids[:-1]
    assert stream(BYTE_LEVEL, token_ids)[-1] == "\ufffd"
    assert "".join(stream(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


def test_replacement_characters_in_the_text_are_text() -> None:
    text = "a\ufffdb\ufffd"
    assert "".join(stream(BYTE_LEVEL, BYTE_LEVEL.encode(text, add_special_tokens=False).ids)) == text


def test_bytes_that_change_the_text_before_them_do_not_take_it_back() -> None:
    token_ids = [SENTENCEPIECE.token_to_id(piece) for piece in ["<0x41>", "<0xE5>", "b", "▁a"]]
    assert stream(SENTENCEPIECE, token_ids) == ["A", "", "\ufffdb", " a", ""]


@tokenizers_of_both_kinds
@settings(max_examples=examples(60))
@given(st.lists(st.integers(3, 258), max_size=100))
def test_any_tokens_give_text_after_a_bounded_wait(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TokenTexts(tokenizer), hidden_ids(tokenizer))
    waiting = 0
    for token_id in token_ids:
        waiting = 0 if detokenizer.feed(token_id) else waiting + 1
        assert waiting <= MAX_PENDING
    detokenizer.flush()
    assert detokenizer.flush() == ""


@settings(max_examples=examples(60))
@given(st.lists(st.integers(3, 258), max_size=MAX_PENDING))
def test_bytes_in_any_order_add_up_to_the_whole_decode(token_ids: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


def test_endless_incomplete_characters_are_not_held_back_for_ever() -> None:
    byte = BYTE_LEVEL.encode("👍", add_special_tokens=False).ids[0]
    pieces = stream(BYTE_LEVEL, [byte] * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert max(len(piece) for piece in pieces) <= MAX_PENDING + 1


def test_special_tokens_leave_no_text_but_markers_do() -> None:
    start = BYTE_LEVEL.token_to_id("<|im_start|>")
    hello = BYTE_LEVEL.encode("hé", add_special_tokens=False).ids
    token_ids = [start, *hello, EOS_ID]
    assert "".join(stream(BYTE_LEVEL, token_ids)) == "hé" == BYTE_LEVEL.decode(token_ids)
    assert stream(BYTE_LEVEL, token_ids, frozenset({start}))[0] == "<|im_start|>"
    assert "".join(stream(BYTE_LEVEL, token_ids, frozenset({start}))) == "<|im_start|>hé"


def test_a_hidden_token_inside_a_character_does_not_break_it() -> None:
    first, *rest = BYTE_LEVEL.encode("é", add_special_tokens=False).ids
    assert "".join(stream(BYTE_LEVEL, [first, EOS_ID, *rest])) == "é"


def test_ids_without_a_token_leave_no_text() -> None:
    assert "".join(stream(BYTE_LEVEL, [310, *BYTE_LEVEL.encode("a", add_special_tokens=False).ids, 311])) == "a"
    ab, b = SENTENCEPIECE.token_to_id("▁ab"), SENTENCEPIECE.token_to_id("▁b")
    assert stream(SENTENCEPIECE, [ab, 400, b]) == ["ab", "", " b", ""]
