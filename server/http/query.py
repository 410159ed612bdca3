"""The query of a request: Google's standard parameters, and those of its method.

Source: the system parameters of Google's APIs and ``parameters`` of their discovery documents. Clients of today send
``alt``, ``key``, ``pageSize`` and ``pageToken``; older ones ``$alt=json;enum-encoding=int``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import HTTPConnection

from server.errors import InvalidArgument

KEYS = ("key", "$key", "access_token", "oauth_token", "bearer_token")
"""Parameters that hold a key, as far as the server is concerned."""
_SPELLINGS = {
    "$alt": "alt",
    "$fields": "fields",
    "$callback": "callback",
    "$prettyPrint": "prettyPrint",
    "pp": "prettyPrint",
    "page_size": "pageSize",
    "page_token": "pageToken",
}
"""Other names of parameters."""
WITHOUT_EFFECT = ("quotaUser", "userIp", "trace", "$.xgafv", "uploadType", "upload_protocol")
"""There are no quotas by user, no traces and one form of errors; the last two say something to an upload only."""
_REFUSED = {"callback": "JSONP is not served: call from an origin that --cors-origin (CASTOR_CORS_ORIGINS) allows"}
_ENUMS = ";enum-encoding="
_SHOWN = 64


def pairs(scope: Mapping[str, Any], encoding: str = "utf-8") -> list[tuple[str, str]]:
    """The parameters of a request, by its ASGI scope, under their usual names and in their order. Bytes that are not
    of the ``encoding`` are replaced."""
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, encoding=encoding)
    return [(_SPELLINGS.get(name, name), value) for name, value in query]


def alt_of(request: HTTPConnection) -> str:
    """The form of the answer that the query asks for, in lowercase; "" where it says nothing."""
    return next((value.lower().partition(_ENUMS)[0] for name, value in pairs(request.scope) if name == "alt"), "")


def read_query(
    request: HTTPConnection, method: str, own: Collection[str], alts: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The values of the method's ``own`` parameters, as far as they are not empty; and the names of what was sent and
    has no effect. ``X-Goog-FieldMask`` is another way to send ``fields``.

    Raises ``InvalidArgument`` for a parameter that the method does not have, for one that is given twice with different
    values, and for values that are not served: ``alts`` are those of ``alt``.
    """
    masks = [("fields", value) for value in request.headers.getlist("x-goog-fieldmask")]
    if not masks and not request.scope["query_string"]:
        return {}, []
    values: dict[str, str] = {}
    for name, value in [*pairs(request.scope), *masks]:
        if name in KEYS:
            continue
        if name in _REFUSED:
            raise InvalidArgument.at(name, f"{name}: {_REFUSED[name]}")
        if name not in {"alt", "prettyPrint", *own, *WITHOUT_EFFECT}:
            raise InvalidArgument.at(
                name[:_SHOWN],
                f'Invalid JSON payload received. Unknown name "{name[:_SHOWN]}": Cannot bind query parameter. '
                f"Field '{name[:_SHOWN]}' could not be found in request message. "
                f"{method} takes: {', '.join(sorted({'alt', 'key', *own}))}.",
            )
        if values.setdefault(name, value) != value:
            raise InvalidArgument.at(name, f"{name} must be given once; it has different values")
    alt, enums, _ = values.pop("alt", "").lower().partition(_ENUMS)
    if alt and alt not in alts:
        raise InvalidArgument.at("alt", f"alt is {alt[:_SHOWN]!r}, but {method} answers with alt={' or '.join(alts)}")
    pretty = values.pop("prettyPrint", "").lower()
    if pretty not in ("", "true", "false", "1", "0"):
        raise InvalidArgument.at("prettyPrint", f"prettyPrint is {pretty[:_SHOWN]!r}, but must be true or false")
    # Answers are on one line, and enums are names.
    ignored = ["enum-encoding"] * bool(enums) + ["prettyPrint"] * (pretty in ("true", "1"))
    ignored += [name for name in WITHOUT_EFFECT if name in values and name not in own]
    return {name: value for name, value in values.items() if value and name not in ignored}, ignored
