"""Contents and their parts: everything that a conversation can contain."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from server.wire.fields import Bool, Bytes, Float, Names, Object, Repeated, String
from server.wire.message import Message
from server.wire.support import Honoured, Ignored, Refused

NO_MEDIA = "only text and documents are served yet, no images, audio or video"
NO_FILES_BACK = "functions answer with data; put the text of a document into the response"
NO_SERVER_TOOLS = "tools that run on the server are not served; declare functions and run them in your program"
ROLES = (
    "user (also function, tool, context, user_context, and where it is not given), model (also assistant) or system "
    "(also developer), in any case"
)
NOT_INPUT = "it only says more about a part that is not served"

MediaLevel = Annotated[
    str | None,
    BeforeValidator(
        Names(
            "MediaResolution",
            "MEDIA_RESOLUTION_UNSPECIFIED",
            "MEDIA_RESOLUTION_LOW",
            "MEDIA_RESOLUTION_MEDIUM",
            "MEDIA_RESOLUTION_HIGH",
            "MEDIA_RESOLUTION_ULTRA_HIGH",
        )
    ),
]
_Processing = Annotated[
    str | None, BeforeValidator(Names("MediaProcessing", "MEDIA_PROCESSING_UNSPECIFIED", "STATIC", "AGENTIC"))
]
_Scheduling = Annotated[
    str | None,
    BeforeValidator(Names("Scheduling", "SCHEDULING_UNSPECIFIED", "SILENT", "WHEN_IDLE", "INTERRUPT")),
]


class Blob(Message):
    """Bytes within the request."""

    mime_type: Annotated[String, Honoured("with a charset for texts; guessed where it is not given")] = ""
    data: Annotated[Bytes, Honoured("read as text; images, audio and video are refused")] = b""
    display_name: Annotated[String, Honoured("shown to the model")] = ""


class FileData(Message):
    """A file that was uploaded before."""

    file_uri: Annotated[String, Honoured("files/ID, or any address that ends so, of a file uploaded here")] = ""
    mime_type: Annotated[String, Honoured("wins over what the upload said")] = ""
    display_name: Annotated[String, Honoured("shown to the model where the file has none")] = ""


class FunctionCall(Message):
    """A call that the model made; ``args`` are the user's data."""

    id: Annotated[String, Honoured("pairs the call with its response")] = ""
    name: Annotated[String, Honoured("the function that the model called; it need not be declared any more")] = ""
    args: Annotated[Object | None, Honoured("the arguments, {} where there are none")] = None
    partial_args: Annotated[Repeated[Object], Refused("calls are never sent in pieces")] = ()
    will_continue: Annotated[Bool, Refused("calls are never sent in pieces")] = False


class FunctionResponsePart(Message):
    """Media that a function returned."""

    inline_data: Annotated[Blob | None, Refused(NO_FILES_BACK, presence=True)] = None
    file_data: Annotated[FileData | None, Refused(NO_FILES_BACK, presence=True)] = None


class FunctionResponse(Message):
    """What a function returned; ``response`` is the user's data."""

    id: Annotated[String, Honoured("the call that it answers; else by name, else by order")] = ""
    name: Annotated[String, Honoured("the function that was called")] = ""
    response: Annotated[Object | None, Honoured("shown to the model as it is")] = None
    parts: Annotated[Repeated[FunctionResponsePart], Honoured("text only: see below")] = ()
    will_continue: Annotated[Bool, Refused("functions answer once")] = False
    scheduling: Annotated[_Scheduling, Refused("functions answer once, in order")] = None


class PartResolution(Message):
    """The resolution at which media are read."""

    level: Annotated[MediaLevel, Honoured()] = None
    num_tokens: Annotated[Float | None, Honoured()] = None


class Part(Message):
    """One piece of a content: exactly one kind of data, and metadata about it."""

    text_field = "text"
    oneof = (
        "text",
        "inline_data",
        "file_data",
        "function_call",
        "function_response",
        "executable_code",
        "code_execution_result",
        "tool_call",
        "tool_response",
    )

    text: Annotated[String | None, Honoured("never read as control tokens")] = None
    inline_data: Annotated[Blob | None, Honoured("a text file or a PDF document, read as text")] = None
    file_data: Annotated[FileData | None, Honoured("a text file or a PDF document, read as text")] = None
    function_call: Annotated[FunctionCall | None, Honoured("a call that the model made")] = None
    function_response: Annotated[FunctionResponse | None, Honoured("what a function returned")] = None
    executable_code: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    code_execution_result: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    tool_call: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    tool_response: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    thought: Annotated[Bool, Honoured("the model is shown earlier thoughts only through their signature")] = False
    thought_signature: Annotated[Bytes, Honoured("brings back earlier thoughts; foreign ones say nothing")] = b""
    video_metadata: Annotated[Object | None, Refused(NO_MEDIA)] = None
    media_resolution: Annotated[PartResolution | None, Refused(NO_MEDIA)] = None
    media_processing: Annotated[_Processing, Refused(NO_MEDIA)] = None
    part_metadata: Annotated[Object | None, Ignored("labels of the caller")] = None

    @property
    def has_data(self) -> bool:
        """Whether the part is more than an empty message; a bare signature counts as an empty text."""
        return bool(self.thought_signature) or any(getattr(self, name) is not None for name in self.oneof)


class Content(Message):
    """One turn: who speaks, and its parts. A bare string is a turn of one text."""

    text_field = "parts"

    role: Annotated[String, Honoured(ROLES)] = ""
    parts: Annotated[Repeated[Part], Honoured("what is said")] = ()
