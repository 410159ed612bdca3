"""Multipart bodies, in whatever pieces they come. (What is refused: tests/server/routes/test_uploads.py.)"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidArgument
from server.storage.files.multipart import MAX_PARTS, MultipartReader, PartBegins, PartData, PartEnds

FORM = "multipart/form-data; boundary=b"


def read(body: bytes, size: int, kind: str = FORM) -> list[Any]:
    """The parts of a body that comes in pieces of a size, each as its head and its bytes."""
    reader = MultipartReader(kind)
    parts: list[Any] = []
    for start in range(0, len(body), size):
        for event in reader.feed(body[start : start + size]):
            match event:
                case PartBegins():
                    parts.append([event, b"", False])
                case PartData(data=data):
                    parts[-1][1] += data
                case PartEnds():
                    parts[-1][2] = True
    reader.close()
    assert all(ended for _, _, ended in parts)
    return [(head, data) for head, data, _ in parts]


@given(st.lists(st.binary(max_size=60), max_size=3), st.integers(1, 40))
def test_every_cut_reads_the_same(contents: list[bytes], size: int) -> None:
    parts = [data.replace(b"\r\n--b", b"") for data in contents]
    heads = [f'--b\r\nContent-Disposition: form-data; name="n{place}"\r\n\r\n' for place in range(len(parts))]
    body = b"".join(head.encode() + data + b"\r\n" for head, data in zip(heads, parts, strict=True)) + b"--b--\r\n"
    found = read(body, size)
    assert [data for _, data in found] == parts
    assert [head.name for head, _ in found] == [f"n{place}" for place in range(len(parts))]


def test_what_a_part_says_of_itself() -> None:
    head = b"--b\r\ncontent-type:  text/csv \r\n"
    head += b'CONTENT-DISPOSITION: form-data; name=file; filename="a/b\\\\c d.csv"\r\n\r\n'
    ((part, data),) = read(head + b"x\r\n--b--", 7)
    assert (part, data) == (PartBegins("file", "c d.csv", "text/csv"), b"x")
    ((part, _),) = read(b"--b\r\n\r\nx\r\n--b--", 7, "multipart/related; boundary=b")
    assert part == PartBegins("", "", "")


def test_the_number_of_parts_is_bounded() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\nx\r\n'
    assert len(read(part * MAX_PARTS + b"--b--", 50)) == MAX_PARTS
    with pytest.raises(InvalidArgument, match=f"more than {MAX_PARTS} parts"):
        read(part * (MAX_PARTS + 1) + b"--b--", 50)
