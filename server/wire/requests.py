"""The requests of generateContent, streamGenerateContent and countTokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from server.wire.content import Content
from server.wire.fields import Bool, Bytes, Names, Repeated, String
from server.wire.generation import GenerationConfig
from server.wire.message import Message
from server.wire.support import Honoured, Ignored, Refused
from server.wire.tools import Tool, ToolConfig

NO_CACHES = "cached contents are not served yet; send the contents themselves"
NO_CLASSIFIER = "no safety classifier stands behind this server"
ONE_TIER = "there is one tier"

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
    """What a classifier would have to block."""

    category: Annotated[_Category, Honoured()] = None
    threshold: Annotated[_Threshold, Honoured()] = None


class GenerateContentRequest(Message):
    """A conversation to be answered."""

    model: Annotated[String, Honoured("must be the model of the path")] = ""
    contents: Annotated[Repeated[Content], Honoured()] = ()
    system_instruction: Annotated[Content | None, Honoured()] = None
    generation_config: Annotated[GenerationConfig, Honoured()] = GenerationConfig()
    tools: Annotated[Repeated[Tool], Honoured()] = ()
    tool_config: Annotated[ToolConfig | None, Honoured()] = None
    safety_settings: Annotated[Repeated[SafetySetting], Ignored(NO_CLASSIFIER)] = ()
    cached_content: Annotated[String, Refused(NO_CACHES)] = ""
    labels: Annotated[dict[str, String] | None, Ignored("labels are for bills")] = None
    service_tier: Annotated[_Tier, Ignored(ONE_TIER)] = None
    store: Annotated[Bool, Ignored("nothing is stored")] = False
    continuation_token: Annotated[Bytes, Refused("answers are never continued; send the conversation")] = b""


class CountTokensRequest(Message):
    """A prompt to be counted: ``contents`` alone, the request that would be sent, or (as other Gemini surfaces have it)
    the parts of a request that make its prompt."""

    model: Annotated[String, Honoured("must be the model of the path")] = ""
    contents: Annotated[Repeated[Content], Honoured()] = ()
    generate_content_request: Annotated[GenerateContentRequest | None, Honoured()] = None
    system_instruction: Annotated[Content | None, Honoured()] = None
    tools: Annotated[Repeated[Tool], Honoured()] = ()
    tool_config: Annotated[ToolConfig | None, Honoured()] = None
    generation_config: Annotated[GenerationConfig, Honoured()] = GenerationConfig()

    def as_generation(self) -> GenerateContentRequest:
        """The request whose prompt is to be counted."""
        if self.generate_content_request is not None:
            return self.generate_content_request
        given = {name: getattr(self, name) for name in self.model_fields_set - {"generate_content_request"}}
        return GenerateContentRequest.model_construct(**given)
