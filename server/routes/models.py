"""GET models and GET models/{model}: what is served, with honest limits."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine.types import EngineUnavailable
from server.body import to_json
from server.convert.sampling import DEFAULT_TEMPERATURE, DEFAULT_TOP_K, DEFAULT_TOP_P, output_limit
from server.errors import InvalidArgument
from server.registry import Entry
from server.wire.generation import MAX_TEMPERATURE

DEFAULT_PAGE = 50
MAX_PAGE = 1000
METHODS = ["generateContent", "countTokens"]


async def list_models(request: Request) -> Response:
    """GET models?pageSize&pageToken: real names in file order, no aliases"""
    entries = request.app.state.registry.entries()
    start = _start(request.query_params.get("pageToken", ""), len(entries))
    end = start + _page_size(request.query_params.get("pageSize", ""))
    page: dict[str, Any] = {"models": [model_resource(entry) for entry in entries[start:end]]}
    if end < len(entries):
        page["nextPageToken"] = _token(end)
    return Response(to_json(page), media_type="application/json")


async def get_model(request: Request, entry: Entry) -> Response:  # noqa: ARG001 - the shape of all methods on a model
    """GET models/{model}, also by alias"""
    return Response(to_json(model_resource(entry)), media_type="application/json")


def model_resource(entry: Entry) -> dict[str, Any]:
    """A Model. Limits that only a loaded engine knows are left out while it loads."""
    spec = entry.spec
    return {
        "name": f"models/{entry.name}",
        "baseModelId": entry.name,
        "version": entry.version,
        "displayName": spec.display_name or entry.name,
        "description": spec.description,
        **_limits(entry),
        "supportedGenerationMethods": METHODS,
        "temperature": DEFAULT_TEMPERATURE if spec.temperature is None else spec.temperature,
        "maxTemperature": MAX_TEMPERATURE,
        "topP": DEFAULT_TOP_P if spec.top_p is None else spec.top_p,
        "topK": DEFAULT_TOP_K if spec.top_k is None else spec.top_k,
        "thinking": False,
    }


def _limits(entry: Entry) -> dict[str, int]:
    """The longest input leaves room for one token of the answer."""
    try:
        info = entry.engine.describe()
    except EngineUnavailable:
        return {"outputTokenLimit": entry.spec.max_output_tokens}
    return {"inputTokenLimit": info.max_context - 1, "outputTokenLimit": output_limit(entry.spec, info)}


def _page_size(text: str) -> int:
    """0 and nothing mean the default; more than the most is the most."""
    if text and not (text.isascii() and text.isdigit()):
        raise InvalidArgument.at("page_size", f"* ListModelsRequest.page_size: {text[:64]!r} is not a number from 0")
    return min(int(text[:9] or "0") or DEFAULT_PAGE, MAX_PAGE)


def _token(start: int) -> str:
    return base64.urlsafe_b64encode(f"models:{start}".encode()).decode().rstrip("=")


def _start(token: str, count: int) -> int:
    if not token:
        return 0
    try:
        kind, _, digits = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode().partition(":")
        start = int(digits) if kind == "models" else -1
    except (binascii.Error, ValueError):
        start = -1
    if not 0 < start < count:
        raise InvalidArgument.at("page_token", f"* ListModelsRequest.page_token: {token[:64]!r} is not one of ours")
    return start
