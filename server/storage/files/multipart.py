"""Multipart bodies, form-data and related, read as a stream: part by part, never whole in memory."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import InvalidArgument

MAX_PARTS = 8


@dataclass(frozen=True, slots=True)
class PartBegins:
    """``name`` and ``filename`` are those of a form, "" where there is none."""

    name: str
    filename: str
    content_type: str


@dataclass(frozen=True, slots=True)
class PartData:
    """Some bytes of the part that began last."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnds:
    """The part that began last is whole."""


Event = PartBegins | PartData | PartEnds


class MultipartReader:
    """``feed`` it the body, ``close`` it at the end. Raises ``InvalidArgument`` for an invalid multipart body."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary or len(boundary) > 70:  # RFC 2046, 5.1.1
            raise InvalidArgument(
                f"Content-Type {kind.decode('latin-1')[:64]} needs the parameter boundary, of 1 to 70 characters"
            )
        self.is_form = kind == b"multipart/form-data"
        self._events: list[Event] = []
        self._headers: dict[str, bytes] = {}
        self._name = self._value = b""
        self._parts = 0
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": lambda data, start, end: self._events.append(PartData(data[start:end])),
                "on_part_end": lambda: self._events.append(PartEnds()),
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> list[Event]:
        """The events in these bytes of the body."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise InvalidArgument(f"The multipart body cannot be read: {error}") from None
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """The body is over."""
        if not self._ended:
            raise InvalidArgument(
                f"The multipart body ends without its last boundary, after {self._parts} parts began; send it whole"
            )

    def _begin(self) -> None:
        self._parts += 1
        self._headers = {}
        if self._parts > MAX_PARTS:
            raise InvalidArgument(f"The multipart body has more than {MAX_PARTS} parts")

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        encoding = _text(self._headers.get("content-transfer-encoding", b"binary")).strip().lower()
        if encoding not in ("binary", "7bit", "8bit"):
            raise InvalidArgument(
                f"Part {self._parts} has the Content-Transfer-Encoding {encoding[:64]!r}; send its bytes as they are"
            )
        _, options = parse_options_header(self._headers.get("content-disposition"))
        name = options.get(b"name", b"")
        if self.is_form and not name:
            raise InvalidArgument(
                f"Part {self._parts} of the form has no name; name the parts metadata (JSON, optional) and file"
            )
        # The last component of the path, with any system's separator.
        filename = _text(options.get(b"filename", b"")).replace("\\", "/").rpartition("/")[2]
        self._events.append(PartBegins(_text(name), filename, _text(self._headers.get("content-type", b"")).strip()))

    def _on_end(self) -> None:
        self._ended = True


def _text(data: bytes) -> str:
    """Browsers and curl send UTF-8; what is not is read as Latin-1 (RFC 7578, 5.1.2 leaves it open)."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
