"""The URL of an upload that was started: a path of the API, and a secret in the query."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

UPLOAD_ID = "upload_id"
_UPLOAD_PATH = re.compile(r"/upload/v\d\w*/files", re.ASCII)


def upload_id_of(scope: Mapping[str, Any]) -> str:
    """The upload that a request continues, by its ASGI scope; "" where it continues none.

    Its URL holds a secret of its own, and SDKs send no key with it (wire reference 2.7): such a request needs no key.
    The path is read in its normal form (`server.http.middleware.path`), the one that is routed. The middleware and the
    route both call this, so that they read the query alike.
    """
    if scope["method"] not in ("POST", "PUT") or not _UPLOAD_PATH.fullmatch(scope["path"]):
        return ""
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    ids = [value for name, value in query if name == UPLOAD_ID]
    return ids[0] if len(ids) == 1 else ""
