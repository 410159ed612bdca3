"""``castor models``, and ``castor check`` without a source: what would be served, and fetching what is missing."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rich.console import Console

from engine.api.errors import SourceError
from engine.api.sampling import SAMPLING_FIELDS
from engine.weights.sources import prepare, prepared_folder
from server.commands.terminal import bars, console, reporter
from server.config.errors import ConfigError, did_you_mean
from server.config.models_file import ModelSpec, load_specs
from server.config.settings import Settings
from server.convert.sampling import entry_default
from server.families.transformers_import import require_library
from server.models.lenient import check_lenient
from server.models.own_defaults import with_own_defaults
from server.models.registry import engine_config, weights_of
from server.observability.logs import configure_logging


def models_file(settings: Settings) -> Path:
    """The models.yaml in force: the one that is set, else the working directory's, else the one Castor comes with."""
    if settings.models is not None:
        return settings.models
    packaged = Path(str(files("server").joinpath("models.yaml")))
    for candidate in (Path("models.yaml"), packaged, packaged.parent.parent / "models.yaml"):
        if candidate.is_file():
            return candidate
    raise ConfigError("there is no models.yaml here: pass --models FILE, or the folder of a model to `castor serve`")


def specs_in(path: Path) -> list[ModelSpec]:
    """The entries of a models.yaml. Raises ``ConfigError``."""
    specs = load_specs(path)
    check_lenient(specs, str(path))
    return specs


def list_models(settings: Settings) -> int:
    """Print every entry and whether its weights are there."""
    configure_logging(settings.log_level)
    screen = output()
    for spec in specs_in(models_file(settings)):
        found = prepared_folder(spec.where(), spec.sha256, settings.cache_dir)
        screen.print(spec.name + (f" (also as {', '.join(spec.aliases)})" if spec.aliases else ""))
        screen.print(f"  source   {spec.source}\n  weights  {found or 'not fetched'}")
        known = found and sampling_of(with_own_defaults(spec, found))
        screen.print(f"  sampling {known or 'known once it is fetched'}")
    return 0


def fetch_models(settings: Settings, names: list[str]) -> int:
    """Fetch and prepare the weights of the named entries, or of all."""
    terminal = console()
    known = {spec.name: spec for spec in specs_in(models_file(settings))}
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"no model is named {name!r}{near}; models.yaml has {', '.join(known)}")
    for spec in [known[name] for name in names or known]:
        with bars(terminal) as lines:
            wanted = engine_config(spec, Path(), settings.cache_dir)
            folder = prepare(spec.where(), spec.sha256, settings.cache_dir, reporter(lines, spec.name), wanted)
        terminal.print(f"{spec.name}: ready in {folder}", soft_wrap=True)
    return 0


def check(settings: Settings) -> int:
    """Print what ``castor serve`` would do with these settings; return 1 where something prevents it."""
    configure_logging(settings.log_level)
    require_library()
    screen = output()
    path = models_file(settings)
    specs = specs_in(path)
    keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API keys"
    screen.print(f"settings: would listen on {settings.host}:{settings.port} with {keys}")
    screen.print(f"models: {path.resolve()}, {len(specs)} in all")
    problems = 0
    for spec in specs:
        try:
            folder = weights_of(spec, settings.cache_dir)
            screen.print(f"{spec.name}: prepared, loads at {spec.load}, {sampling_of(with_own_defaults(spec, folder))}")
        except SourceError as error:
            problems += 1
            screen.print(f"{spec.name}: {error}")
    return 1 if problems else 0


def sampling_of(served: ModelSpec) -> str:
    """How requests are sampled that name nothing, by an entry that has the defaults of its model."""
    fields = (field for field in SAMPLING_FIELDS.values() if field.in_entry)
    return ", ".join(f"{field.name} {entry_default(field, served):g}" for field in fields)


def output(*, wrap: bool = False) -> Console:
    """Standard output for results, with nothing cut off or broken, so that it can be copied and searched.

    With ``wrap``, lines are broken as a terminal needs it.
    """
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=not wrap)
