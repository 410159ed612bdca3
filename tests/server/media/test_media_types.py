"""What a document is taken for, and the text that is made of it."""

from __future__ import annotations

import encodings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.media.media_types import Unreadable, check_pdf, declared_type, decoded, guessed_type, is_text, refused

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"))


@pytest.mark.parametrize(
    ("declared", "found"),
    [
        ("text/plain", ("text/plain", "")),
        ("Text/HTML; Charset=ISO-8859-1", ("text/html", "ISO-8859-1")),
        ('text/csv; header=present; charset="utf-8"', ("text/csv", "utf-8")),
        ("", ("", "")),
        ("é", ("é", "")),
    ],
)
def test_a_declared_type(declared: str, found: tuple[str, str]) -> None:
    assert declared_type(declared) == found


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/markdown",
        "text/csv",
        "text/html",
        "text/x-python",
        "application/json",
        "application/ld+json",
        "application/xml",
        "application/javascript",
        "application/x-python",
        "application/yaml",
        "application/toml",
        "application/sql",
    ],
)
def test_types_that_are_their_own_text(kind: str) -> None:
    assert is_text(kind)


@pytest.mark.parametrize(
    "kind", ["image/png", "image/svg+xml", "application/pdf", "application/zip", "video/mp4", "textual", ""]
)
def test_types_that_are_not(kind: str) -> None:
    assert not is_text(kind)


@given(TEXTS)
def test_text_comes_through_in_every_unicode_encoding(text: str) -> None:
    for charset in ("utf-8", "utf-16", "UTF-16LE", "utf-32"):
        assert decoded(text.encode(charset), "text/plain", charset) == text
    for codec in ("utf-8-sig", "utf-16"):
        assert decoded(text.encode(codec), "text/plain", "") == text


def test_the_declared_charset_is_the_one() -> None:
    assert decoded("Grüße".encode("latin-1"), "text/plain", "iso-8859-1") == "Grüße"
    assert decoded("żółw".encode("cp1250"), "text/plain", "windows-1250") == "żółw"
    assert decoded("日本".encode("shift_jis"), "text/plain", "Shift_JIS") == "日本"
    assert decoded(b"a\r\nb", "text/plain", "") == "a\nb"


@pytest.mark.parametrize(
    ("data", "charset", "words"),
    [
        ("Grüße".encode("latin-1"), "", "not utf-8 text at byte 2; declare its charset"),
        (b"\xff", "ascii", "not ascii text at byte 0"),
        (b"x", "klingon", "'klingon' is not known"),
        (b"x", "rot13", "no charset of texts"),
        (b"x", "zlib", "no charset of texts"),
        (b"x", "idna", "is not known"),
        (b"x", "unicode-escape", "is not known"),
        (b"x", "mbcs", "is not known"),
        (b"x", "a\0b", "is not known"),
        (b"x", "x" * 200, "is not known"),
        ("hello".encode("utf-16-le"), "", "NUL characters"),
        (b"%PDF-1.7", "", "declared text/plain, but its content is a PDF"),
        (b"\x89PNG\r\n\x1a\n", "latin-1", "a PNG image"),
        (b"PK\x03\x04x", "latin-1", "a zip archive"),
    ],
)
def test_what_is_no_text_is_refused_with_the_reason(data: bytes, charset: str, words: str) -> None:
    with pytest.raises(Unreadable) as refusal:
        decoded(data, "text/plain", charset)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_names_of_charsets_that_strangers_make_up_are_not_remembered() -> None:
    before = len(encodings._cache)
    for number in range(50):
        with pytest.raises(Unreadable):
            decoded(b"x", "text/plain", f"made-up-{number}")
    assert len(encodings._cache) == before


def test_a_type_that_is_far_too_long_is_not_parsed() -> None:
    with pytest.raises(Unreadable, match="has 257 characters, but at most 256"):
        declared_type("text/plain" + ";" * 247)


def test_a_pdf_must_begin_like_one() -> None:
    check_pdf(b"%PDF-1.4")
    check_pdf(b" " * 100 + b"%PDF-1.4")
    for data, words in ((b"hello", "no PDF document"), (b"GIF89a", "a GIF image"), (b"", "no PDF document")):
        with pytest.raises(Unreadable, match=words):
            check_pdf(data)


def test_a_document_without_a_type_is_looked_at() -> None:
    assert guessed_type(b"%PDF-1.4") == "application/pdf"
    assert guessed_type(b"hello") == guessed_type(b"") == "text/plain"


def test_media_are_refused_by_name() -> None:
    assert str(refused("image/png")).startswith("image/png: this model reads text, no images")
    assert "application/zip cannot be read; text files" in str(refused("application/zip"))
    assert "without a type" in str(refused(""))
