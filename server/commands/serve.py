"""``castor serve``: the server process."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from engine.weights.sources import prepare
from server.app import create_app
from server.commands.models import models_file, specs_in
from server.commands.terminal import bars, console, reporter, say_ready, watch_loading
from server.config.models_file import spec_of_path
from server.config.settings import Settings
from server.families.transformers_import import require_library
from server.http.serving import CastorServer, bind, settle
from server.models.registry import Registry, engine_config, weights_of
from server.observability.logs import configure_logging
from server.services import Services


def serve(settings: Settings, path: Path | None, *, fetch: bool) -> NoReturn:
    """Serve the models of models.yaml, or the one model at ``path``, until a signal, which ends the process.

    A file at ``path`` is prepared first, and with ``fetch`` what models.yaml names. Settings, names and the port are
    checked before.
    """
    terminal = console()
    configure_logging(settings.log_level)
    require_library()
    specs = [spec_of_path(path)] if path is not None else specs_in(models_file(settings))
    listener = bind(settings)
    if fetch or path is not None:
        with bars(terminal) as lines:
            for spec in specs:
                wanted = engine_config(spec, Path(), settings.cache_dir)
                prepare(spec.where(), spec.sha256, settings.cache_dir, reporter(lines, spec.name), wanted)
    for spec in specs:
        if spec.load == "start":  # refused here, not at the first request
            weights_of(spec, settings.cache_dir)
    registry = Registry(specs, settings.cache_dir)
    port = listener.getsockname()[1]

    async def announce(server: CastorServer) -> None:
        if await watch_loading(registry, terminal):
            settle()
            say_ready(registry, settings, port, terminal)
        else:
            server.end(exit_code=1)

    app = create_app(settings, registry)
    services: Services = app.state.services
    CastorServer(app, settings, announce, services.draining.set, registry.close).run(sockets=[listener])
