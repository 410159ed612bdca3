"""The messages of the Files API."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.wire.fields import Float, Int64, Object, String
from server.wire.message import Message
from server.wire.support import Honoured, Ignored

DEFAULT_PAGE = 10
MAX_PAGE = 100
OUTPUT_ONLY = "output only: the server sets it"


class File(Message):
    """A file's metadata. Clients may set the first four fields."""

    name: Annotated[
        String,
        Honoured(
            "files/ and 1 to 40 lowercase letters, digits and dashes (not at the ends); made where it is not given"
        ),
    ] = ""
    display_name: Annotated[String, Honoured("at most 512 characters; the name of the file where it is not given")] = ""
    mime_type: Annotated[String, Honoured("guessed from the name where it is not given")] = ""
    size_bytes: Annotated[Annotated[Int64, Field(ge=0)] | None, Honoured("that many bytes must come")] = None
    create_time: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    update_time: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    expiration_time: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    sha256_hash: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    uri: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    download_uri: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    state: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    source: Annotated[String, Ignored(OUTPUT_ONLY)] = ""
    error: Annotated[Object | None, Ignored(OUTPUT_ONLY)] = None
    video_metadata: Annotated[Object | None, Ignored(OUTPUT_ONLY)] = None


class CreateFileRequest(Message):
    """The request that starts an upload."""

    file: Annotated[File, Honoured("what is said of the file")] = File()


class ListFilesRequest(Message):
    """The query of GET files."""

    page_size: Annotated[
        Annotated[Float, Field(ge=0)], Honoured(f"{DEFAULT_PAGE} where it is 0 or not given, {MAX_PAGE} at most")
    ] = 0
    page_token: Annotated[String, Honoured("the nextPageToken of the page before")] = ""
