"""GET models and GET models/{model}: what is served, with honest limits."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine.api.errors import EngineUnavailable
from engine.api.sampling import SAMPLING_FIELDS
from server.convert.sampling import entry_default, output_limit
from server.errors import InvalidArgument
from server.http.json_body import json_response
from server.models.registry import Entry
from server.routes.reading import ignored_header
from server.services import Services
from server.wire.message import parse
from server.wire.requests import DEFAULT_PAGE, MAX_PAGE, ListModelsRequest

METHODS = ["generateContent", "countTokens"]


async def list_models(request: Request, services: Services) -> Response:
    """GET models?pageSize&pageToken: real names in file order, no aliases"""
    entries = services.registry.entries()
    wanted = parse(ListModelsRequest, {name: request.state.query.get(name) for name in ("pageSize", "pageToken")})
    start = 0
    if token := wanted.page_token:
        try:
            kind, _, digits = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode().partition(":")
            start = int(digits) if kind == "models" else -1
        except (binascii.Error, ValueError):
            start = -1
        if not 0 < start < len(entries):
            raise InvalidArgument.at(
                "page_token", f"* ListModelsRequest.page_token: {token[:64]!r} is not a nextPageToken of this server"
            )
    end = start + (int(min(wanted.page_size, MAX_PAGE)) or DEFAULT_PAGE)
    page: dict[str, Any] = {"models": [model_resource(entry) for entry in entries[start:end]]}
    if end < len(entries):
        page["nextPageToken"] = base64.urlsafe_b64encode(f"models:{end}".encode()).decode().rstrip("=")
    return json_response(request.state.mask.applied(page), ignored_header(request.state.record.ignored))


async def get_model(request: Request, _: Services, entry: Entry) -> Response:
    """GET models/{model}, also by alias"""
    answer = request.state.mask.applied(model_resource(entry))
    return json_response(answer, ignored_header(request.state.record.ignored))


def model_resource(entry: Entry) -> dict[str, Any]:
    """A Model. What is known only of a loaded model is left out while it loads."""
    spec = entry.spec
    try:
        info = entry.engine.describe()
        thinks = entry.tokenizer.family.thought is not None
    except EngineUnavailable:
        abilities: dict[str, Any] = {"outputTokenLimit": spec.max_output_tokens}
    else:
        # The longest input leaves room for one token of the answer.
        limits = {"inputTokenLimit": info.max_context - 1, "outputTokenLimit": output_limit(spec, info)}
        abilities = {**limits, "thinking": thinks}
    defaults = {
        field.wire_name: entry_default(field, spec)
        for field in SAMPLING_FIELDS.values()
        if field.wire_name and field.in_entry
    }
    return {
        "name": f"models/{entry.name}",
        "baseModelId": entry.name,
        "version": entry.version,
        "displayName": spec.display_name or entry.name,
        "description": spec.description,
        **abilities,
        "supportedGenerationMethods": METHODS,
        "temperature": defaults.pop("temperature"),
        "maxTemperature": SAMPLING_FIELDS["temperature"].asked.high,
        **defaults,
    }
