"""Bodies that clients send packed (Content-Encoding; RFC 9110, 8.4)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from server.errors import InvalidArgument

PIECE_BYTES = 64 * 1024
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
_ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})


class Unpacker:
    """Unpacks the pieces of one body. What is not packed passes as it is; its ``encoding`` is "".

    Raises ``InvalidArgument`` for an encoding that it does not know.
    """

    def __init__(self, content_encoding: str) -> None:
        named = [word.strip().lower() for word in content_encoding.split(",")]
        encodings = [word for word in named if word not in ("", "identity")]
        if len(encodings) > 1 or not _ENCODINGS.issuperset(encodings):
            raise InvalidArgument(
                f"Content-Encoding {content_encoding[:64]!r} is not accepted; send the body as it is, or packed once "
                "with gzip or deflate",
                headers={"Accept-Encoding": "gzip, deflate"},
            )
        self.encoding = "".join(encodings)
        self._member = zlib.decompressobj(_GZIP_OR_ZLIB)

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """What this piece holds, in pieces of at most ``PIECE_BYTES`` where it is packed.

        Raises ``InvalidArgument``.
        """
        if not self.encoding:
            yield piece
            return
        while piece:
            if self._member.eof:  # gzip's members follow each other
                self._member = zlib.decompressobj(_GZIP_OR_ZLIB)
            try:
                unpacked = self._member.decompress(piece, PIECE_BYTES)
            except zlib.error:
                raise InvalidArgument(f"The body is not {self.encoding}, which Content-Encoding says.") from None
            piece = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if unpacked:
                yield unpacked

    def end(self) -> bytes:
        """The last bytes. Raises ``InvalidArgument`` where more should come."""
        rest = self._member.flush() if self.encoding else b""
        if self.encoding and not self._member.eof:
            raise InvalidArgument(f"The body is cut off: its {self.encoding} has no end.")
        return rest
