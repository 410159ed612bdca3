"""The types of documents: as the client declares them, checked against the bytes; and the text of text files."""

from __future__ import annotations

import codecs
import re
from encodings import normalize_encoding
from encodings.aliases import aliases

from python_multipart.multipart import parse_options_header

PDF = "application/pdf"
UNKNOWN = "application/octet-stream"
TEXT = "text/plain"

_TEXT_LIKE = re.compile(
    r"text/.+|.+\+(?:json|xml|yaml)|application/(?:json|json5|jsonl|ndjson|x-ndjson|jsonlines|xml|yaml|x-yaml|toml|x-toml|"
    r"javascript|x-javascript|ecmascript|typescript|x-typescript|x-python|x-python-code|x-sh|x-shellscript|x-httpd-php|"
    r"x-php|x-ruby|x-perl|x-tex|x-latex|sql|x-sql|graphql|rtf|x-ipynb|csv)"
)
_SIGNATURES = {
    b"%PDF-": "a PDF document",
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a zip archive (as are docx, xlsx and pptx)",
    b"\x1f\x8b": "gzip data",
    b"RIFF": "a RIFF file (WebP, WAV or AVI)",
    b"OggS": "an Ogg file",
    b"ID3": "an MP3 file",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
}
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHARSETS = frozenset({*aliases, *aliases.values(), "utf_8_sig"})
_PDF_HEAD = 1024
_MEDIA = ("image", "audio", "video")
MAX_TYPE_CHARACTERS = 256
READABLE = "text files (plain, Markdown, CSV, HTML, JSON, code) and PDF documents are read, as text"


class Unreadable(ValueError):
    """A document cannot become part of a prompt; the message is a sentence for the client."""


def declared_type(mime_type: str) -> tuple[str, str]:
    """The type in lower case without its parameters, and the charset among these, "" where none is declared.

    Raises ``Unreadable`` for one that is too long to be parsed.
    """
    if len(mime_type) > MAX_TYPE_CHARACTERS:
        raise Unreadable(f"its type has {len(mime_type)} characters, but at most {MAX_TYPE_CHARACTERS} are read")
    kind, options = parse_options_header(mime_type.encode("latin-1", "replace"))
    return kind.decode("latin-1").strip().lower(), options.get(b"charset", b"").decode("latin-1").strip()


def is_text(kind: str) -> bool:
    """Whether documents of a type are plain text."""
    return _TEXT_LIKE.fullmatch(kind) is not None and kind.partition("/")[0] not in _MEDIA


def guessed_type(head: bytes) -> str:
    """The type of a document without a declared one, by its first bytes."""
    return PDF if b"%PDF-" in head[:_PDF_HEAD] else TEXT


def check_pdf(head: bytes) -> None:
    """Raises ``Unreadable`` for bytes that no PDF document begins with."""
    if b"%PDF-" not in head[:_PDF_HEAD]:
        raise Unreadable(f"it is declared {PDF}, but its content is {_looks(head) or 'no PDF document'}")


def decoded(data: bytes, kind: str, charset: str) -> str:
    """The text of a text file: in its declared charset, else as its byte order mark says, else in UTF-8.

    Raises ``Unreadable``.
    """
    looks = _looks(data)
    if looks:
        raise Unreadable(f"it is declared {kind[:64]}, but its content is {looks}")
    codec = _codec(charset) if charset else next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"it is not {charset or codec} text at byte {error.start}; "
            f"declare its charset, such as {kind[:64]}; charset=iso-8859-1"
        ) from None
    if "\0" in text:
        raise Unreadable(f"it is declared {kind[:64]}, but holds NUL characters; if it is UTF-16, declare the charset")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def refused(kind: str) -> Unreadable:
    """Why a document of another type is not read."""
    if kind.partition("/")[0] in _MEDIA:
        return Unreadable(f"{kind[:64]}: this model reads text, no images, audio or video; {READABLE}")
    return Unreadable(f"{kind[:64] or 'a document without a type'} cannot be read; {READABLE}")


def _codec(charset: str) -> str:
    # Python caches every name that it was ever asked for, so it is only asked for those that exist.
    known = normalize_encoding(charset).lower() in _CHARSETS
    try:
        codec = codecs.lookup(charset) if known else None
    except LookupError:  # codecs of other systems
        codec = None
    if codec is None:
        raise Unreadable(f"its charset {charset[:64]!r} is not known; utf-8, utf-16 and iso-8859-1 are")
    if not codec._is_text_encoding:
        raise Unreadable(f"its charset {charset[:64]!r} is no charset of texts; use utf-8, utf-16 or iso-8859-1")
    return codec.name


def _looks(head: bytes) -> str:
    return next((what for signature, what in _SIGNATURES.items() if head.startswith(signature)), "")
