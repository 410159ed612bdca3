"""The services that the routes of one server share, built once and passed to each of them."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from server.config.errors import ConfigError
from server.config.settings import Settings
from server.generation.pipeline import Pipeline
from server.grammar.compiler import GrammarCompiler
from server.mapper.thought_signature import signature_key
from server.media.documents import DocumentReader
from server.models.registry import Registry
from server.observability.metrics import Metrics
from server.storage.files.store import FileLimits, FileStore
from server.storage.files.upload import Uploads
from server.version import castor_version


@dataclass(frozen=True, slots=True)
class Services:
    """``draining`` is set when the server starts to shut down."""

    settings: Settings
    registry: Registry
    metrics: Metrics
    grammars: GrammarCompiler
    pipeline: Pipeline
    files: FileStore
    uploads: Uploads
    draining: asyncio.Event

    async def close(self) -> None:
        """Unload the models, end the child processes and close the catalog of files."""
        await self.registry.close()
        await self.grammars.close()
        self.files.close()


def build_services(settings: Settings, registry: Registry) -> Services:
    """The services of one server. Raises ``ConfigError`` where the data folder cannot be used."""
    key = signature_key(settings.data_dir)
    folder = settings.data_dir / "files"
    limits = FileLimits(
        file_bytes=settings.max_file_bytes,
        owner_bytes=settings.max_key_file_bytes,
        total_bytes=settings.max_total_file_bytes,
        lifetime=settings.file_hours * 3600,
    )
    try:
        files = FileStore(folder, limits)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the folder of uploaded files {folder} cannot be used: {error}") from None
    grammars = GrammarCompiler()
    return Services(
        settings=settings,
        registry=registry,
        metrics=Metrics(registry.entries, castor_version()),
        grammars=grammars,
        pipeline=Pipeline(registry, DocumentReader(files), grammars, key),
        files=files,
        uploads=Uploads(files),
        draining=asyncio.Event(),
    )


def services_of(request: HTTPConnection) -> Services:
    """The services of the server that a request came to."""
    services: Services = request.app.state.services
    return services
