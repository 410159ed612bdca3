"""GenerationConfig: how an answer is made."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

from engine.api.sampling import MAX_LOGPROBS, SAMPLING_FIELDS
from server.wire.content import NO_MEDIA, MediaLevel
from server.wire.fields import Bool, Float, Int32, Names, Object, Repeated, String
from server.wire.message import Message
from server.wire.support import THINKING, Honoured, Refused

MAX_CANDIDATES = 8
MAX_STOP_SEQUENCES = 16
"""Google takes 5; clients that complete code send a dozen."""
MAX_STOP_CHARACTERS = 256

FORMAT_TYPES = ("APPLICATION_JSON", "TEXT_PLAIN")
MIME_TYPES = ("text/plain", "application/json", "text/x.enum")
NO_THINKING = "this model cannot think; leave it out or send thinkingBudget 0"
SCHEMA_KEYWORDS = "the answer follows it; what cannot be enforced is named, and checked afterwards"
TEXT_ONLY = "answers are text only"

_Modality = Annotated[
    str | None, BeforeValidator(Names("Modality", "MODALITY_UNSPECIFIED", "TEXT", "IMAGE", "AUDIO", "VIDEO"))
]
_Level = Annotated[
    str | None,
    BeforeValidator(Names("ThinkingLevel", "THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH")),
]
_FormatType = Annotated[
    str | None, BeforeValidator(Names("TextResponseFormat.MimeType", "MIME_TYPE_UNSPECIFIED", *FORMAT_TYPES))
]


def _few(value: Any) -> Any:
    """Counted before each is validated: half a million invalid ones would give half a million errors."""
    if isinstance(value, list) and len(value) > MAX_STOP_SEQUENCES:
        context = {"field_type": "List", "max_length": MAX_STOP_SEQUENCES, "actual_length": len(value)}
        raise PydanticKnownError("too_long", context)
    return value


def _asked(name: str) -> Any:
    asked = SAMPLING_FIELDS[name].asked
    return Field(ge=asked.low, le=asked.high)


_Stop = Annotated[String, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ThinkingConfig(Message):
    """How much the model thinks, and whether its thoughts are shown. -1 leaves the amount to the model."""

    include_thoughts: Annotated[Bool, Honoured("a model that does not think has no thoughts to include")] = False
    thinking_budget: Annotated[
        Annotated[Int32, Field(ge=-1)] | None,
        Honoured(NO_THINKING, only=lambda budget: budget < 1, code=400, requires=THINKING),
    ] = None
    thinking_level: Annotated[_Level, Honoured(NO_THINKING, only=lambda _: False, code=400, requires=THINKING)] = None


def _all_text(modalities: Any) -> bool:
    return all(modality in (None, "TEXT") for modality in modalities)


def _served(mime_type: Any) -> bool:
    return mime_type.lower() in MIME_TYPES


class TextResponseFormat(Message):
    """The form of a text: a MIME type, and a JSON Schema where it is JSON."""

    mime_type: Annotated[_FormatType, Honoured("as responseMimeType")] = None
    schema_: Annotated[Any, Honoured(SCHEMA_KEYWORDS)] = None
    other_names: ClassVar = {"schema": "schema_"}


class ResponseFormatConfig(Message):
    """The newer way to set the form of an answer."""

    text: Annotated[TextResponseFormat | None, Honoured("the form of the text")] = None
    audio: Annotated[Object | None, Refused(TEXT_ONLY, presence=True)] = None
    image: Annotated[Object | None, Refused(TEXT_ONLY, presence=True)] = None


class GenerationConfig(Message):
    """Everything that shapes one answer. Ranges: wire reference, section 3.1."""

    other_names: ClassVar = {"_responseJsonSchema": "response_json_schema"}

    temperature: Annotated[Annotated[Float, _asked("temperature")] | None, Honoured("0 is greedy")] = None
    top_p: Annotated[
        Annotated[Float, _asked("top_p")] | None, Honoured("the most likely tokens that make up this share")
    ] = None
    top_k: Annotated[Annotated[Int32, _asked("top_k")] | None, Honoured("0 is off")] = None
    candidate_count: Annotated[
        Annotated[Int32, Field(ge=1, le=MAX_CANDIDATES)] | None,
        Honoured("1 to 8 answers to one prompt, which is computed once"),
    ] = None
    max_output_tokens: Annotated[Annotated[Int32, Field(ge=1)] | None, Honoured("capped at outputTokenLimit")] = None
    stop_sequences: Annotated[
        Annotated[Repeated[_Stop], BeforeValidator(_few)],
        Honoured(f"up to {MAX_STOP_SEQUENCES}; the first that comes up ends the answer and is not part of it"),
    ] = ()
    presence_penalty: Annotated[
        Annotated[Float, _asked("presence_penalty")] | None, Honoured("-2 to 2, once for each token that was said")
    ] = None
    frequency_penalty: Annotated[
        Annotated[Float, _asked("frequency_penalty")] | None, Honoured("-2 to 2, for each time that a token was said")
    ] = None
    seed: Annotated[Int32 | None, Honoured("the same seed and request give the same answer, also under load")] = None
    response_logprobs: Annotated[Bool, Honoured("log-probabilities of the chosen tokens")] = False
    logprobs: Annotated[
        Annotated[Int32, Field(ge=0, le=MAX_LOGPROBS)] | None, Honoured("only with responseLogprobs")
    ] = None
    response_mime_type: Annotated[
        String, Honoured(f"must be one of {', '.join(MIME_TYPES)}", only=_served, code=400)
    ] = ""
    response_schema: Annotated[Object | None, Honoured(SCHEMA_KEYWORDS)] = None
    response_json_schema: Annotated[Any, Honoured(SCHEMA_KEYWORDS)] = None
    response_format: Annotated[
        ResponseFormatConfig | None, Honoured("the newer way to say responseMimeType and responseJsonSchema")
    ] = None
    response_modalities: Annotated[Repeated[_Modality], Honoured(TEXT_ONLY, only=_all_text)] = ()
    thinking_config: Annotated[ThinkingConfig | None, Honoured("how much the model thinks before it answers")] = None
    media_resolution: Annotated[MediaLevel, Refused(NO_MEDIA)] = None
    speech_config: Annotated[Object | None, Refused(TEXT_ONLY)] = None
    image_config: Annotated[Object | None, Refused(TEXT_ONLY)] = None
    audio_timestamp: Annotated[Bool, Refused(NO_MEDIA)] = False
    audio_transcription_config: Annotated[Object | None, Refused(NO_MEDIA)] = None
    translation_config: Annotated[Object | None, Refused("translation is not served")] = None
    enable_affective_dialog: Annotated[Bool, Refused(TEXT_ONLY)] = False
    enable_enhanced_civic_answers: Annotated[Bool, Refused("this server has no such service")] = False
