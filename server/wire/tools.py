"""Tools: functions that the caller declares, and tools that Google runs on its servers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from server.wire.content import NO_SERVER_TOOLS
from server.wire.fields import Bool, Names, Object, Repeated, String
from server.wire.message import Message
from server.wire.support import Honoured, Refused

_Mode = Annotated[
    str | None,
    BeforeValidator(Names("FunctionCallingConfig.Mode", "MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED")),
]
_Behavior = Annotated[str | None, BeforeValidator(Names("Behavior", "UNSPECIFIED", "BLOCKING", "NON_BLOCKING"))]

RETURN = "tells the model what the function returns, where its template knows how"
PARAMETERS = "shown to the model; arguments follow it; what cannot be enforced is named, and checked afterwards"
WAITS = "the model always waits for the function's answer; leave it out or send BLOCKING"


class FunctionDeclaration(Message):
    """A function that the model may call; its schemas are the user's data."""

    name: Annotated[String, Honoured("what the model calls")] = ""
    description: Annotated[String, Honoured("shown to the model")] = ""
    parameters: Annotated[Object | None, Honoured(PARAMETERS)] = None
    parameters_json_schema: Annotated[Object | None, Honoured(PARAMETERS)] = None
    response: Annotated[Object | None, Honoured(RETURN)] = None
    response_json_schema: Annotated[Object | None, Honoured(RETURN)] = None
    behavior: Annotated[_Behavior, Honoured(WAITS, only=lambda behavior: behavior == "BLOCKING")] = None


class Tool(Message):
    """One entry of ``tools``; it may hold several kinds at once."""

    function_declarations: Annotated[
        Repeated[FunctionDeclaration], Honoured("functions that the model may call and your program runs")
    ] = ()
    google_search: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    google_search_retrieval: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    code_execution: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    url_context: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    file_search: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    google_maps: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    computer_use: Annotated[Object | None, Refused(NO_SERVER_TOOLS, presence=True)] = None
    mcp_servers: Annotated[Repeated[Object], Refused(NO_SERVER_TOOLS)] = ()


class FunctionCallingConfig(Message):
    """Whether the model may, must or must not call, and which functions."""

    mode: Annotated[_Mode, Honoured("AUTO where it is not given")] = None
    allowed_function_names: Annotated[Repeated[String], Honoured("only with ANY or VALIDATED")] = ()
    stream_function_call_arguments: Annotated[Bool, Refused("calls are never sent in pieces")] = False


class ToolConfig(Message):
    """How the tools are used."""

    function_calling_config: Annotated[
        FunctionCallingConfig | None, Honoured("whether the model may, must or must not call")
    ] = None
    retrieval_config: Annotated[Object | None, Refused(NO_SERVER_TOOLS)] = None
    include_server_side_tool_invocations: Annotated[Bool, Refused(NO_SERVER_TOOLS)] = False
