"""What each scalar type accepts."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from server.wire.fields import Bool, Bytes, Float, Int32, Names, Object, String

RAW = bytes(range(256))


@pytest.mark.parametrize("value", [40, 40.0, "40", "4e1", "40.0"])
def test_integers(value: Any) -> None:
    assert TypeAdapter(Int32).validate_python(value) == 40


@pytest.mark.parametrize("value", [True, "x", 40.5, "", " 40", "4_0", 2**31, -(2**31) - 1, [], {}, "٤", 10**400, "inf"])
def test_not_integers(value: Any) -> None:
    with pytest.raises(ValidationError, match="TYPE_INT32"):
        TypeAdapter(Int32).validate_python(value)


@pytest.mark.parametrize("value", [0.5, "0.5", "5e-1"])
def test_floats(value: Any) -> None:
    assert TypeAdapter(Float).validate_python(value) == 0.5


@pytest.mark.parametrize("value", ["NaN", "Infinity", float("inf"), False, "0x1", "", [0.5]])
def test_not_floats(value: Any) -> None:
    with pytest.raises(ValidationError, match="TYPE_FLOAT"):
        TypeAdapter(Float).validate_python(value)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("length", range(254, 257))
def test_bytes_in_all_four_spellings(encode: Any, length: int) -> None:
    text = encode(RAW[:length]).decode()
    lines = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for spelling in (text, text.rstrip("="), f"{lines}\n", f" {text}"):
        assert TypeAdapter(Bytes).validate_python(spelling) == RAW[:length]


def test_a_signature_that_a_client_makes_up_is_base64() -> None:
    assert TypeAdapter(Bytes).validate_python("skip_thought_signature_validator")


@pytest.mark.parametrize("value", ["a", "ab=c", "é", "!!!!", 5, None])
def test_not_bytes(value: Any) -> None:
    with pytest.raises(ValidationError, match="TYPE_BYTES"):
        TypeAdapter(Bytes).validate_python(value)


@pytest.mark.parametrize(
    ("kind", "value"), [(Bool, 1), (Bool, "true"), (String, 1), (String, None), (Object, []), (Object, "x")]
)
def test_no_coercion(kind: Any, value: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


def test_enums_by_name_in_any_case_and_by_number() -> None:
    names = Names("Mode", "MODE_UNSPECIFIED", "AUTO", "ANY")
    assert [names(value) for value in ("AUTO", "auto", 1, 1.0)] == ["AUTO"] * 4
    assert [names(value) for value in ("MODE_UNSPECIFIED", 0)] == [None, None]
