"""GenerationConfig: how an answer is made."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from server.wire.content import NO_MEDIA, MediaLevel
from server.wire.fields import Bool, Float, Int32, Names, Object, Repeated, String
from server.wire.message import Message
from server.wire.support import Honoured, Refused

MAX_CANDIDATES = 8
MAX_STOP_SEQUENCES = 5
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 2.0

NO_STRUCTURE = "structured output is not served yet; leave it out or ask for text/plain"
NO_THINKING = "this model cannot think; leave it out or send thinkingBudget 0"
TEXT_ONLY = "answers are text only"

_Modality = Annotated[
    str | None, BeforeValidator(Names("Modality", "MODALITY_UNSPECIFIED", "TEXT", "IMAGE", "AUDIO", "VIDEO"))
]
_Level = Annotated[
    str | None,
    BeforeValidator(Names("ThinkingLevel", "THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH")),
]
_Stop = Annotated[String, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Penalty = Annotated[Float, Field(ge=-2, le=2)]


class ThinkingConfig(Message):
    """How much the model thinks, and whether its thoughts are shown. -1 leaves the amount to the model."""

    include_thoughts: Annotated[Bool, Honoured("a model that does not think has no thoughts to include")] = False
    thinking_budget: Annotated[
        Annotated[Int32, Field(ge=-1)] | None, Honoured(NO_THINKING, only=lambda budget: budget < 1, code=400)
    ] = None
    thinking_level: Annotated[_Level, Refused(NO_THINKING, code=400)] = None


def _all_text(modalities: Any) -> bool:
    return all(modality in (None, "TEXT") for modality in modalities)


def _plain(mime_type: Any) -> bool:
    return bool(mime_type.lower() == "text/plain")


class GenerationConfig(Message):
    """Everything that shapes one answer. Ranges: wire reference, section 3.1."""

    other_names: ClassVar = {"_responseJsonSchema": "response_json_schema"}

    temperature: Annotated[Annotated[Float, Field(ge=0, le=MAX_TEMPERATURE)] | None, Honoured("0 is greedy")] = None
    top_p: Annotated[Annotated[Float, Field(ge=0, le=1)] | None, Honoured()] = None
    top_k: Annotated[Annotated[Int32, Field(ge=0)] | None, Honoured("0 is off")] = None
    candidate_count: Annotated[Annotated[Int32, Field(ge=1, le=MAX_CANDIDATES)] | None, Honoured()] = None
    max_output_tokens: Annotated[Annotated[Int32, Field(ge=1)] | None, Honoured("capped at outputTokenLimit")] = None
    stop_sequences: Annotated[Annotated[Repeated[_Stop], Field(max_length=MAX_STOP_SEQUENCES)], Honoured()] = ()
    presence_penalty: Annotated[_Penalty | None, Honoured()] = None
    frequency_penalty: Annotated[_Penalty | None, Honoured()] = None
    seed: Annotated[Int32 | None, Honoured()] = None
    response_logprobs: Annotated[Bool, Honoured()] = False
    logprobs: Annotated[Annotated[Int32, Field(ge=0, le=20)] | None, Honoured("only with responseLogprobs")] = None
    response_mime_type: Annotated[String, Honoured(NO_STRUCTURE, only=_plain)] = ""
    response_schema: Annotated[Object | None, Refused(NO_STRUCTURE)] = None
    response_json_schema: Annotated[Any, Refused(NO_STRUCTURE)] = None
    response_format: Annotated[Object | None, Refused(NO_STRUCTURE)] = None
    response_modalities: Annotated[Repeated[_Modality], Honoured(TEXT_ONLY, only=_all_text)] = ()
    thinking_config: Annotated[ThinkingConfig | None, Honoured()] = None
    media_resolution: Annotated[MediaLevel, Refused(NO_MEDIA)] = None
    speech_config: Annotated[Object | None, Refused(TEXT_ONLY)] = None
    image_config: Annotated[Object | None, Refused(TEXT_ONLY)] = None
    audio_timestamp: Annotated[Bool, Refused(NO_MEDIA)] = False
    audio_transcription_config: Annotated[Object | None, Refused(NO_MEDIA)] = None
    translation_config: Annotated[Object | None, Refused("translation is not served")] = None
    enable_affective_dialog: Annotated[Bool, Refused(TEXT_ONLY)] = False
    enable_enhanced_civic_answers: Annotated[Bool, Refused("no such service stands behind this server")] = False
