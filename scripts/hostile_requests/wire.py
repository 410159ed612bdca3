"""Mutations of a request's bytes: of its body, its headers, its path, and how it is framed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

BOMB = gzip.compress(bytes(30_000_000), mtime=0)
"""More than any body may be, in 30 kB."""


@dataclass(slots=True)
class Wire:
    """A request as it goes out. ``framing`` is what tells the length of the body; "" makes the right one."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    framing: str = ""
    cut: bool = False

    def content(self) -> bytes:
        """All bytes."""
        framing = self.framing or f"content-length: {len(self.body)}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head = f"{self.method} {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n{lines}{framing}\r\n"
        whole = head.encode("utf-8", "surrogateescape") + self.body
        return whole[: len(whole) * 2 // 3] if self.cut else whole


def flip(random: Random, wire: Wire) -> None:
    """Change bits of one to three bytes of the body."""
    body = bytearray(wire.body)
    for _ in range(random.choice((1, 1, 1, 3)) if body else 0):
        body[random.randrange(len(body))] ^= 1 << random.randrange(8)
    wire.body = bytes(body)


def truncate(random: Random, wire: Wire) -> None:
    """End the body early."""
    wire.body = wire.body[: random.randint(0, len(wire.body))]


def insert(random: Random, wire: Wire) -> None:
    """Put bytes somewhere into the body: white space and other breaks more often than not."""
    at = random.randint(0, len(wire.body))
    piece = random.choice(
        (b" ", b"\n", b"\t", b"\r\n", b",", b"'", b"\x00", b"\xff", b"\xef\xbb\xbf", b"//", b"}", b"[")
    )
    wire.body = wire.body[:at] + piece * random.choice((1, 1, 2, 1000)) + wire.body[at:]


def packed(random: Random, wire: Wire) -> None:
    """Pack the body, well, badly, or only by name."""
    whole = gzip.compress(wire.body, mtime=0)
    coding, body = random.choice(
        (
            ("gzip", whole),
            ("gzip", whole),
            ("x-gzip", whole),
            ("deflate", zlib.compress(wire.body)),
            ("gzip", whole[: len(whole) // 2]),
            ("gzip", whole[:12] + bytes(40) + whole[12:]),
            ("gzip", wire.body),
            ("gzip", whole + b"more"),
            ("gzip", BOMB),
            ("gzip, gzip", gzip.compress(whole, mtime=0)),
            ("br", wire.body),
            ("identity", wire.body),
        )
    )
    wire.headers.append(("content-encoding", coding))
    wire.body = body


def header(random: Random, wire: Wire) -> None:
    """Add, change or repeat a header."""
    wire.headers.append(
        random.choice(
            (
                ("upgrade", "h2c"),
                ("expect", "100-continue"),
                ("accept", "text/event-stream"),
                ("accept-encoding", "br, gzip, *;q=0"),
                (
                    "content-type",
                    random.choice(("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\xe9")),
                ),
                ("x-goog-api-key", "k" * random.choice((1, 200, 5000))),
                ("authorization", random.choice(("Bearer", "Bearer  a b", "Basic !!", "\udcff"))),
                ("x-goog-fieldmask", random.choice(("candidates", "nonsense", "candidates(", "*", "a" * 3000))),
                ("x-goog-upload-protocol", random.choice(("raw", "resumable", "multipart", "x"))),
                ("x-goog-upload-command", random.choice(("start", "upload, finalize", "query", "cancel", "x"))),
                ("origin", random.choice(("null", "http://localhost:1", "http://[::1", "\udcff"))),
                ("range", "bytes=9-1"),
                ("if-none-match", "*"),
                ("x-" + "a" * random.choice((1, 300)), "b" * random.choice((0, 1, 9000))),
            )
        )
    )


def path(random: Random, wire: Wire) -> None:
    """Spell the path or the query otherwise."""
    before, colon, after = wire.path.partition(":")
    wire.path = random.choice(
        (
            f"/{wire.path}",
            f"/v1beta{wire.path}",
            f"/any/prefix{wire.path}",
            f"{before}/{colon}{after}",
            f"{before}%3A{after}",
            f"{before}%2F..%2F{colon}{after}",
            f"{before}/../x{colon}{after}",
            wire.path.replace("/", "//"),
            wire.path.upper(),
            wire.path[:-1],
            f"{wire.path}{'&' if '?' in wire.path else '?'}{_parameter(random)}",
            f"{wire.path}{'&' if '?' in wire.path else '?'}{_parameter(random)}",
            f"{wire.path}/",
            f"{before}\udcff%ff%00{colon}{after}",
            f"{before}{'a' * 9000}{colon}{after}",
            "*",
            f"http://127.0.0.1{wire.path}",
        )
    )


def _parameter(random: Random) -> str:
    return random.choice(
        (
            "alt=sse",
            "alt=json",
            "alt=proto",
            "fields=candidates",
            "fields=usageMetadata/totalTokenCount,candidates(content)",
            "fields=a(b(c(d(",
            "%24fields=*",
            "prettyPrint=true",
            "key=any",
            "key=%00",
            "nonsense=1",
            "pageSize=-1",
            "pageToken=zzz",
            "=",
            "&&&",
            "%",
        )
    )


def method(random: Random, wire: Wire) -> None:
    """Another method."""
    wire.method = random.choice(("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"))


def framing(random: Random, wire: Wire) -> None:
    """Tell the length of the body otherwise, rightly or wrongly, or end the connection early."""
    size = len(wire.body)
    pieces = b"".join(
        b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (wire.body[: size // 2], wire.body[size // 2 :]) if piece
    )
    wire.framing, wire.body, wire.cut = random.choice(
        (
            ("transfer-encoding: chunked\r\n", pieces + b"0\r\n\r\n", False),
            ("transfer-encoding: chunked\r\n", pieces + b"0\r\nx-trailer: 1\r\n\r\n", False),
            ("transfer-encoding: chunked\r\n", pieces, False),
            ("transfer-encoding: chunked\r\n", b"zz\r\n" + pieces, False),
            (f"transfer-encoding: chunked\r\ncontent-length: {size}\r\n", pieces + b"0\r\n\r\n", False),
            (f"content-length: {size + 7}\r\n", wire.body, False),
            (f"content-length: {size // 2}\r\n", wire.body, False),
            ("content-length: -1\r\n", wire.body, False),
            (f"content-length: {size}\r\ncontent-length: {size + 1}\r\n", wire.body, False),
            ("content-length: 99999999999999\r\n", wire.body, False),
            ("no colon\r\n", wire.body, False),
            ("", wire.body, True),
        )
    )


BYTES: dict[str, Callable[[Random, Wire], None]] = {
    mutation.__name__: mutation for mutation in (flip, truncate, insert, packed, header, path, method, framing)
}
"""Each changes the request in place."""
