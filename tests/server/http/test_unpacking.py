"""Bodies that clients send packed."""

from __future__ import annotations

import gzip
import random
import zlib

import pytest

from server.errors import InvalidArgument
from server.http.unpacking import PIECE_BYTES, Unpacker

TEXT = b"hello" * 1000
RANDOM = random.Random(0).randbytes(200_000)


def unpacked(packed: bytes, encoding: str, step: int) -> bytes:
    unpacker = Unpacker(encoding)
    pieces = [piece for at in range(0, len(packed), step) for piece in unpacker.feed(packed[at : at + step])]
    assert not encoding or all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join([*pieces, unpacker.end()])


@pytest.mark.parametrize("step", [1, 7, 16_384, 10**9])
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip", "deflate"])
@pytest.mark.parametrize("content", [b"", TEXT, bytes(5_000_000)], ids=["empty", "text", "zeros"])
def test_what_was_packed_comes_back_in_any_pieces(content: bytes, encoding: str, step: int) -> None:
    pack = zlib.compress if encoding == "deflate" else gzip.compress
    assert unpacked(pack(content), encoding, step) == content


def test_what_cannot_be_made_smaller() -> None:
    assert unpacked(gzip.compress(RANDOM), "gzip", 1000) == RANDOM


@pytest.mark.parametrize("step", [1, 10**9])
def test_members_of_gzip_follow_each_other(step: int) -> None:
    assert unpacked(gzip.compress(b"ab") + gzip.compress(b"") + gzip.compress(b"c"), "gzip", step) == b"abc"


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
def test_what_is_not_packed_passes(encoding: str) -> None:
    unpacker = Unpacker(encoding)
    assert [*unpacker.feed(TEXT), unpacker.end()] == [TEXT, b""]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 1000])
def test_other_encodings_are_refused_with_those_that_are_known(encoding: str) -> None:
    with pytest.raises(InvalidArgument, match="gzip or deflate") as refusal:
        Unpacker(encoding)
    assert refusal.value.headers == {"Accept-Encoding": "gzip, deflate"}
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize(
    "body",
    [b'{"a":1}', gzip.compress(TEXT) + b"more", b"\x1f\x8b\x08" + b"x" * 100],
    ids=["text", "more behind it", "a broken head"],
)
def test_what_is_not_packed_though_it_is_said(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match="not gzip, which Content-Encoding says"):
        unpacked(body, "gzip", 10**9)


@pytest.mark.parametrize("left", [0, 1, 10, 20])
def test_what_is_cut_off(left: int) -> None:
    with pytest.raises(InvalidArgument, match="cut off"):
        unpacked(gzip.compress(TEXT)[:left], "gzip", 10**9)
