"""The normal form of a request's path, which keys, routes, framings and the log read alike.

Clients write one method of the API in many ways: behind the path of a proxy, with the version twice (a base URL that
ends in one, and an SDK that adds its own), with doubled or trailing slashes, as Vertex AI names models, with the
version in front of ``upload``. The normal form is the shortest of them: ``/VERSION/…``, ``/upload/VERSION/files`` or
``/ws/…``; what is no path of the API keeps its own, without empty steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.middleware.forwarded import PREFIX

DEFAULT_VERSION = "v1beta"
"""Where a path has none."""
MAX_PREFIX = 512
"""Characters; answers repeat the prefix in every address of a file."""
PLAIN_PATH = "plain_path"
"""In the request's state: the whole path, only without empty steps."""
UNSERVED_COLLECTIONS = (
    "agents|auth_tokens|batches|cachedContents|corpora|credentials|decisions|dynamic|environments|"
    "fileSearchStores|generatedFiles|interactions|operations|triggers|tunedModels|voices|webhooks"
)
COLLECTIONS = frozenset(
    ["models", "files", "openai", "projects", "publishers", "endpoints", *UNSERVED_COLLECTIONS.split("|")]
)
"""What follows the version, or begins a path that has none."""
_VERSION = re.compile(r"v\d\w*", re.ASCII)


class PathMiddleware:
    """Puts the normal form of the path into ``scope["path"]``, and what stood before it behind the ``PREFIX`` in the
    request's state. A proxy that names its prefix and sends it on in the path means one. ``raw_path`` stays as it was
    sent, and nothing reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            plain = re.sub("/+", "/", f"/{scope['path']}")
            prefix, scope["path"] = normalized(plain)
            state = scope.setdefault("state", {})
            state[PLAIN_PATH] = plain
            named, own = state.get(PREFIX, ""), quote(prefix, safe="/~:@!$&'()*+,;=")
            state[PREFIX] = own if f"{own}/".startswith(f"{named}/") else named + own
        await self._app(scope, receive, send)


@lru_cache(256)  # clients use few paths, and a full server refuses most that come
def normalized(path: str) -> tuple[str, str]:
    """The prefix of a proxy, "" or with a slash in front, and the normal form of the rest. ``path`` is decoded once.

    The path of the API begins with the first version that a collection follows, else where a collection begins the
    path, else with the first version, else with the first collection. So names of models that hold versions or names of
    collections are read whole after ``models/``.
    """
    steps = [step for step in path.split("/") if step]
    plain = "/" + "/".join(steps)
    start = _start(steps)
    prefix = "".join(f"/{step}" for step in steps[: start or 0])
    if len(prefix) > MAX_PREFIX:
        return "", plain
    if start is None:
        # POST org/name:generateContent: some clients put names that hold a slash directly behind the base URL.
        return "", f"/{DEFAULT_VERSION}{plain}" if steps and ":" in steps[-1] else plain
    version, uploads, place = DEFAULT_VERSION, False, start
    while place < len(steps):
        if _VERSION.fullmatch(steps[place]):
            version = steps[place]
            place += 1
        elif _is_transfer(steps, place):
            uploads = steps[place] == "upload"
            place += 1
        elif (wrapping := _wrapping(steps[place : place + 6])) > 0:
            place += wrapping
        else:
            break
    rest = steps[place:]
    if _is_socket(steps, place):
        return prefix, "/" + "/".join(rest)
    if uploads and rest == ["files"]:
        return prefix, f"/upload/{version}/files"
    if rest[:1] == rest[-2:-1] == ["files"] and rest[1] in ("http:", "https:"):
        rest = rest[-2:]  # google-genai puts a whole uri after files/ to get the file with that uri
    return prefix, "/" + "/".join([version, *rest])


def _start(steps: Sequence[str]) -> int | None:
    """The place at which the path of the API begins; None where there is no such place."""
    first_version = None
    place = 0
    while place < len(steps):
        end = _after_versions(steps, place)
        is_collection = place < end < len(steps) and steps[end] in COLLECTIONS
        if is_collection or _is_transfer(steps, end) or _is_socket(steps, end):
            return place
        if place < end and first_version is None:
            first_version = place
        place = max(end, place + 1)
    if steps and steps[0] in COLLECTIONS:
        return 0
    if first_version is not None:
        return first_version
    return next((place for place, step in enumerate(steps) if step in COLLECTIONS), None)


def _after_versions(steps: Sequence[str], place: int) -> int:
    while place < len(steps) and _VERSION.fullmatch(steps[place]):
        place += 1
    return place


def _is_socket(steps: Sequence[str], place: int) -> bool:
    """Whether the address of a websocket stands here: ws/google.ai.generativelanguage.v1beta.GenerativeService.…"""
    return place + 1 < len(steps) and steps[place] == "ws" and steps[place + 1].startswith("google.")


def _is_transfer(steps: Sequence[str], place: int) -> bool:
    """Whether upload/ or download/ stands here, with or without versions before what is uploaded or downloaded."""
    if place >= len(steps) or steps[place] not in ("upload", "download"):
        return False
    target = _after_versions(steps, place + 1)
    if target >= len(steps):
        return False
    if steps[place] == "download":
        return steps[target] == "files"
    return steps[target] == "fileSearchStores" or (steps[target] == "files" and target == len(steps) - 1)


def _wrapping(steps: Sequence[str]) -> int:
    """How many of these steps say no more than the next ones: doubled collections, and Vertex AI's way to a model."""
    match steps:
        case ["models", "models", _, *_] | ["files", "files", _, *_]:
            return 1
        case ["projects", _, "locations", _, collection, *_] if collection in COLLECTIONS:
            return 4
        case ["publishers", _, "models", *_]:
            return 2
        case ["models", "publishers", _, "models", _, *_] | ["models", "projects", _, "locations", _, "publishers"]:
            return 1
    return 0
