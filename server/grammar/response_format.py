"""The form that an answer must have: what the fields of GenerationConfig ask for together, or why they contradict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.errors import InvalidArgument
from server.wire.generation import GenerationConfig

PLAIN = "text/plain"
JSON = "application/json"
ENUM = "text/x.enum"

_CONFIG = "generation_config"
_FORMAT_TYPES = {"APPLICATION_JSON": JSON, "TEXT_PLAIN": PLAIN}


@dataclass(frozen=True, slots=True)
class Form:
    """A MIME type, and the caller's schema with the path of the field that it came in.

    ``openapi`` says that the schema is a ``Schema`` message and not JSON Schema.
    """

    mime_type: str
    schema: Any
    field: str
    openapi: bool = False


def answer_form(config: GenerationConfig) -> Form | None:
    """The form that the answer must have; None for free text. Raises ``InvalidArgument`` for contradictions."""
    text = config.response_format.text if config.response_format is not None else None
    given = (
        Form("", config.response_schema, f"{_CONFIG}.response_schema", openapi=True),
        Form("", config.response_json_schema, f"{_CONFIG}.response_json_schema"),
        Form("", text.schema_ if text is not None else None, f"{_CONFIG}.response_format.text.schema"),
    )
    # An empty schema says nothing and counts as absent.
    schemas = [form for form in given if form.schema is not None and form.schema != {}]
    if len(schemas) > 1:
        raise _wrong(schemas[1].field, f"cannot be set together with {schemas[0].field}")
    named = (config.response_mime_type or "").lower()
    other = _FORMAT_TYPES.get((text.mime_type or "") if text is not None else "", "")
    if named and other and named != other:
        raise _wrong(f"{_CONFIG}.response_format.text.mime_type", f"is {other}, but responseMimeType is {named}")
    mime_type = named or other or PLAIN
    if not schemas:
        if mime_type == ENUM:
            raise _wrong(f"{_CONFIG}.response_mime_type", f"{ENUM} needs a responseSchema with an enum")
        return Form(JSON, {}, f"{_CONFIG}.response_mime_type") if mime_type == JSON else None
    form = schemas[0]
    if mime_type == PLAIN:
        raise _wrong(form.field, f"needs a responseMimeType of {JSON} or {ENUM}, not {PLAIN}")
    return Form(mime_type, form.schema, form.field, form.openapi)


def _wrong(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.at(field, f"* GenerateContentRequest.{field}: {description}")
