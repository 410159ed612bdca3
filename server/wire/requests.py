"""The requests of generateContent, streamGenerateContent and countTokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from server.wire.content import Content
from server.wire.fields import Bool, Bytes, Float, Names, Repeated, String
from server.wire.generation import GenerationConfig
from server.wire.message import Message
from server.wire.support import Honoured, Ignored, Refused, fields_of
from server.wire.tools import Tool, ToolConfig

NO_CACHES = "cached contents are not served yet; send the contents themselves"
NO_CLASSIFIER = "this server has no safety classifier"
ONE_TIER = "there is one tier"

DEFAULT_PAGE = 50
MAX_PAGE = 1000

_Category = Annotated[
    str | None,
    BeforeValidator(
        Names(
            "HarmCategory",
            "HARM_CATEGORY_UNSPECIFIED",
            "HARM_CATEGORY_DEROGATORY",
            "HARM_CATEGORY_TOXICITY",
            "HARM_CATEGORY_VIOLENCE",
            "HARM_CATEGORY_SEXUAL",
            "HARM_CATEGORY_MEDICAL",
            "HARM_CATEGORY_DANGEROUS",
            "HARM_CATEGORY_HARASSMENT",
            "HARM_CATEGORY_HATE_SPEECH",
            "HARM_CATEGORY_SEXUALLY_EXPLICIT",
            "HARM_CATEGORY_DANGEROUS_CONTENT",
            "HARM_CATEGORY_CIVIC_INTEGRITY",
            "HARM_CATEGORY_JAILBREAK",
            "HARM_CATEGORY_IMAGE_HATE",
            "HARM_CATEGORY_IMAGE_DANGEROUS_CONTENT",
            "HARM_CATEGORY_IMAGE_HARASSMENT",
            "HARM_CATEGORY_IMAGE_SEXUALLY_EXPLICIT",
        )
    ),
]
_Threshold = Annotated[
    str | None,
    BeforeValidator(
        Names(
            "HarmBlockThreshold",
            "HARM_BLOCK_THRESHOLD_UNSPECIFIED",
            "BLOCK_LOW_AND_ABOVE",
            "BLOCK_MEDIUM_AND_ABOVE",
            "BLOCK_ONLY_HIGH",
            "BLOCK_NONE",
            "OFF",
        )
    ),
]
_Tier = Annotated[str | None, BeforeValidator(Names("ServiceTier", "unspecified", "standard", "flex", "priority"))]


class SafetySetting(Message):
    """A threshold for a safety classifier."""

    category: Annotated[_Category, Honoured()] = None
    threshold: Annotated[_Threshold, Honoured()] = None


class GenerateContentRequest(Message):
    """A conversation to be answered."""

    model: Annotated[String, Honoured("must be the model of the path")] = ""
    contents: Annotated[Repeated[Content], Honoured("the conversation, oldest turn first")] = ()
    system_instruction: Annotated[Content | None, Honoured("the system message of the chat template")] = None
    generation_config: Annotated[GenerationConfig, Honoured("how the answer is made")] = GenerationConfig()
    tools: Annotated[Repeated[Tool], Honoured("functions that the model may call")] = ()
    tool_config: Annotated[ToolConfig | None, Honoured("whether it may, must or must not call")] = None
    safety_settings: Annotated[Repeated[SafetySetting], Ignored(NO_CLASSIFIER)] = ()
    cached_content: Annotated[String, Refused(NO_CACHES)] = ""
    labels: Annotated[dict[str, String] | None, Ignored("billing labels have no effect")] = None
    service_tier: Annotated[_Tier, Ignored(ONE_TIER)] = None
    store: Annotated[Bool, Ignored("nothing is stored")] = False
    continuation_token: Annotated[Bytes, Refused("answers are never continued; send the conversation")] = b""

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the model that the message holds."""
        return (self.model,)

    def as_generation(self) -> GenerateContentRequest:
        """Itself: see ``CountTokensRequest``."""
        return self


class CountTokensRequest(Message):
    """A prompt to be counted: ``contents`` alone, the request that would be sent, or (as other Gemini surfaces have it)
    the parts of a request that make its prompt."""

    model: Annotated[String, Honoured("must be the model of the path")] = ""
    contents: Annotated[Repeated[Content], Honoured("counted")] = ()
    generate_content_request: Annotated[GenerateContentRequest | None, Honoured("counted as it would be sent")] = None
    system_instruction: Annotated[Content | None, Honoured("counted")] = None
    tools: Annotated[Repeated[Tool], Honoured("counted as they are declared to the model")] = ()
    tool_config: Annotated[ToolConfig | None, Honoured("counted as far as it changes the prompt")] = None
    generation_config: Annotated[GenerationConfig, Honoured("counted as far as it changes the prompt")] = (
        GenerationConfig()
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the model that the message holds."""
        return self.model, self.as_generation().model

    def as_generation(self) -> GenerateContentRequest:
        """The request whose prompt is to be counted."""
        if self.generate_content_request is not None:
            return self.generate_content_request
        given = {name: getattr(self, name) for name in self.model_fields_set - {"generate_content_request"}}
        return GenerateContentRequest.model_construct(**given)


class ListModelsRequest(Message):
    """The query of GET models."""

    page_size: Annotated[
        Annotated[Float, Field(ge=0)], Honoured(f"{DEFAULT_PAGE} where it is 0 or not given, {MAX_PAGE} at most")
    ] = 0
    page_token: Annotated[String, Honoured("the nextPageToken of the page before")] = ""


INDISPENSABLE = ("model", "contents", "systemInstruction.")
"""The input of the model and the model itself: no part of them can be left out of a request."""


def lenient_paths() -> list[str]:
    """The JSON paths of all fields that an operator may accept without effect."""
    return [path for path in fields_of(GenerateContentRequest) if not path.startswith(INDISPENSABLE)]
