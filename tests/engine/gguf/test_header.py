"""Headers: what gguf-py writes is read as it reads it, and nothing that a file says is believed unchecked."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import write_tiny_gguf

from engine.gguf.header import MOST_ELEMENTS, Unreadable, read_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {"general.sampling.temp": 0.5, "general.name": "Größe", "tokenizer.ggml.eot_token_id": 2}
    return write_tiny_gguf(tmp_path_factory.mktemp("whole") / "in.gguf", metadata=metadata)


def test_a_header_says_what_gguf_py_reads_in_it(whole: Path) -> None:
    header, reader = read_header(whole), gguf.GGUFReader(whole)
    assert header.architecture == "llama"
    known = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == known
    assert len(known["tokenizer.ggml.tokens"]) > 256
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.kind, found.start) == (tensor.tensor_type.value, tensor.data_offset)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_file_that_is_cut_off_is_refused_at_any_place(whole: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    cut = whole.with_name("cut.gguf")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(Unreadable, match=r"cut off or damaged|it is empty|does not begin with GGUF"):
        read_header(cut)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_header_is_read_or_refused_in_one_sentence(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, 9000))] = data.draw(st.integers(0, 255))
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content)
    told = ""
    try:
        read_header(damaged)
    except Unreadable as refusal:
        told = str(refusal)
    assert len(told) < 600
    assert not told or told.isprintable()


def header_of(*keys: bytes, tensors: int = 0, version: int = 3, count: int | None = None) -> bytes:
    content = b"".join(keys)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(keys) if count is None else count) + content


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (header_of(version=1) + bytes(40), "has version 1 of GGUF; 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian files are not read"),
        (header_of(count=1 << 60), "cut off or damaged"),
        (header_of(tensors=1 << 60), "cut off or damaged"),
        (header_of(struct.pack("<Q", 1 << 63) + bytes(40)), "cut off or damaged"),
        (header_of(text("a") + struct.pack("<IIQ", 9, 8, 1 << 62) + bytes(40)), "cut off or damaged"),
        (header_of(text("a") + struct.pack("<IIQ", 9, 4, 1 << 62) + bytes(40)), "cut off or damaged"),
        (header_of(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)), "an array of the type 9"),
        (header_of(text("a") + struct.pack("<I", 77) + bytes(40)), "metadata of the type 77"),
        (header_of(text("a") + struct.pack("<I", 8) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40)), "no UTF-8"),
        (header_of(bytes(0)) + bytes(40), "names no general.architecture"),
        (header_of(ARCHITECTURE, text("general.alignment") + struct.pack("<II", 4, 12)), "not a power of two"),
    ],
)  # fmt: skip
def test_what_a_hostile_header_says(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=told):
        read_header(path)


def test_an_array_of_more_elements_than_any_model_has(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(header_of(text("a") + struct.pack("<IIQ", 9, 0, MOST_ELEMENTS + 1)))
        file.truncate(MOST_ELEMENTS + 1000)
    with pytest.raises(Unreadable, match=f"an array of {MOST_ELEMENTS + 1} elements"):
        read_header(path)


@pytest.mark.parametrize(
    ("shape", "kind", "told"),
    [
        ((), 0, "has 0 dimensions"),
        ((1,) * 5, 0, "has 5 dimensions"),
        ((64,), 15, r"its tensor t is in Q8_K, which cannot be unpacked; known are F32, F16, BF16, IQ1_M"),
        ((64,), 99, "is in the type 99"),
        ((100,), 12, "does not divide into blocks of Q4_K"),
        ((1 << 62, 1 << 62), 0, "cut off or damaged"),
        ((64,), 0, "cut off or damaged"),
    ],
)
def test_what_a_hostile_tensor_says(shape: tuple[int, ...], kind: int, told: str, tmp_path: Path) -> None:
    entry = text("t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 1 << 40)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(header_of(ARCHITECTURE, tensors=1) + entry + bytes(64))
    with pytest.raises(Unreadable, match=told):
        read_header(path)


def write_parts(folder: Path, count: int = 2, told: int | None = None) -> Path:
    """A model of two tensors, one in each of its parts."""
    for number in range(count):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05}-of-{count:05}.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count if told is None else told)
        writer.add_tensor(f"t{number}", np.full(32, number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{count:05}.gguf"


def test_parts_are_one_model(tmp_path: Path) -> None:
    header = read_header(write_parts(tmp_path))
    assert [tensor.path.name for tensor in header.tensors.values()] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    assert header.parts == tuple(tensor.path for tensor in header.tensors.values())


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    second = first.with_name("m-00002-of-00002.gguf")
    with pytest.raises(Unreadable, match=r"it is part 00002 of 2; name the first one, m-00001-of-00002.gguf"):
        read_header(second)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(Unreadable, match="must be called NAME-00001-of-00002"):
        read_header(renamed)
    renamed.rename(first)
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(Unreadable, match=r"its part m-00002-of-00002.gguf is missing"):
        read_header(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(Unreadable, match="has the tensor 't0' once more"):
        read_header(first)
    second.write_bytes(kept)
    write_parts(tmp_path, told=3)
    with pytest.raises(Unreadable, match="its 2 parts have 2 tensors, and the first one speaks of 3"):
        read_header(first)
