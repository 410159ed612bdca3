"""The command ``castor``: options in, exit codes out. 1: an error, in one sentence on stderr; 2: wrong usage."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.bench import options

if TYPE_CHECKING:
    from server.config.settings import Settings

app = typer.Typer(
    help="Serves open models from local weights behind the Gemini REST format.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="The models of models.yaml.", no_args_is_help=True)
app.add_typer(models, name="models")

ModelsFile = Annotated[Path | None, typer.Option("--models", help="The models.yaml to use.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder for prepared weights.")]
Names = Annotated[list[str] | None, typer.Argument(help="Entries of models.yaml; without any, all of them.")]


@app.callback(invoke_without_command=True)
def castor(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the command itself."""
    if version:
        from server.version import castor_version

        print(f"castor {castor_version()}")
        raise typer.Exit


@app.command()
def serve(
    path: Annotated[Path | None, typer.Argument(help="A model folder or .gguf file to serve without YAML.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless set.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8080 unless set, 0 for a free one.")] = None,
    models: ModelsFile = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the server's own data.")] = None,
    cache_dir: CacheDir = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Seconds that running requests get to finish at shutdown.")
    ] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="File with one API key per line.")] = None,
    allow_no_keys: Annotated[
        bool, typer.Option("--allow-no-keys", help="Serve other machines without API keys.")
    ] = False,
    trusted_proxies: Annotated[
        list[str] | None, typer.Option("--trusted-proxy", help="Address whose X-Forwarded-* headers count; repeatable.")
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="Additional host name of this server; repeatable.")
    ] = None,
    cors_origins: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web origin that may use the server; repeatable.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="First fetch and prepare missing weights.")] = False,
    only_check_options: Annotated[bool, typer.Option("--only-check-options", hidden=True)] = False,
) -> None:
    """Serve the models of models.yaml, or the one at PATH. Every option can be set as CASTOR_… in the environment."""
    if path is not None and models is not None:
        raise typer.BadParameter("give either PATH or --models, not both")
    settings = _settings(
        host=host,
        port=port,
        models=models,
        data_dir=data_dir,
        cache_dir=cache_dir,
        log_level=log_level,
        drain_seconds=drain_seconds,
        api_keys_file=api_keys_file,
        allow_no_keys=allow_no_keys or None,
        trusted_proxies=_tuple(trusted_proxies),
        allowed_hosts=_tuple(allowed_hosts),
        cors_origins=_tuple(cors_origins),
    )
    if only_check_options:  # by scripts/serve, before anything but typer and yaml is installed
        from server.config.models_file import load_specs, spec_of_path

        _ = spec_of_path(path) if path is not None else settings.models and load_specs(settings.models)
        return
    # What the server writes is for its user alone, and no process that it starts needs the keys.
    os.umask(0o077)
    os.environ.pop("CASTOR_API_KEYS", None)
    from server.commands.serve import serve as run

    run(settings, path, fetch=fetch)


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Name or alias; the first model unless given.")] = None,
    url: Annotated[str, typer.Option(help="The base URL of the server.")] = "http://127.0.0.1:8080",
    system: Annotated[str | None, typer.Option(help="The system instruction.")] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--file", help="A file to ask about, text or PDF; repeatable.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 to 2; the model's own default unless given.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and speed after each answer.")] = False,
) -> None:
    """Talk to a model of a running server, or pipe one question into it. The first of CASTOR_API_KEYS is the key."""
    from server.commands.chat import ChatOptions
    from server.commands.chat import chat as run

    settings = _settings()
    options = ChatOptions(
        url=url,
        model=model,
        api_key=next(iter(settings.api_keys), None),
        system=system,
        files=tuple(files or ()),
        temperature=temperature,
        stats=stats,
        state_dir=settings.state_dir,
    )
    raise typer.Exit(run(options))


@app.command()
def check(
    source: Annotated[
        str | None, typer.Argument(help="A model: hf:ORG/NAME, a folder, a .gguf file or an entry of models.yaml.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of the context that memory is shown for.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N, in place of the entry's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights, in place of the entry's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print SOURCE's report as one JSON object.")] = False,
    models: ModelsFile = None,
    cache_dir: CacheDir = None,
) -> None:
    """Say whether SOURCE can be served, of which no weights are needed; without SOURCE, check what is configured."""
    settings = _settings(models=models, cache_dir=cache_dir)
    if source is not None:
        from server.commands.check import check_source

        found = check_source(settings, source, context=context, device=device, dtype=dtype, as_json=as_json)
        raise typer.Exit(found)
    if as_json or any(option is not None for option in (context, device, dtype)):
        raise typer.BadParameter("--context, --device, --dtype and --json need a SOURCE")
    from server.commands.models import check as run

    raise typer.Exit(run(settings))


@app.command()
def bench(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="A running server, like http://127.0.0.1:8080.")
    ] = None,
    model: options.ModelName = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for URL; on this machine the first of CASTOR_API_KEYS unless given.")
    ] = None,
    scenario: Annotated[str, typer.Option(help="throughput, R2 to R6, prefix or intrusion.")] = "throughput",
    streams: options.Streams = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds; each runs the whole scenario.")] = 3,
    requests: options.Requests = None,
    seconds: options.Seconds = None,
    tokens: options.Tokens = None,
    prompt_tokens: options.PromptTokens = None,
    rates: options.Rates = None,
    shares: options.Shares = None,
    ttft_limit: options.TtftLimit = 2.0,
    tpot_limit: options.TpotLimit = 0.2,
    seed: options.Seed = None,
    output: options.Output = Path("benchmarks"),
) -> None:
    """Measure the server at URL. To start and compare servers on this machine, run ./scripts/bench from a checkout."""
    from server.commands.bench import BenchOptions
    from server.commands.bench import bench as run

    given = BenchOptions(
        url=url,
        model=model,
        api_key=api_key,
        scenario=scenario,
        streams=streams,
        rounds=rounds,
        requests=requests,
        seconds=seconds,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        rates=rates,
        shares=shares,
        ttft_limit=ttft_limit,
        tpot_limit=tpot_limit,
        seed=seed,
        output=output,
    )
    raise typer.Exit(run(given, _settings()))


@models.command("list")
def list_models(models: ModelsFile = None, cache_dir: CacheDir = None) -> None:
    """List the models and where their weights come from."""
    from server.commands.models import list_models as run

    raise typer.Exit(run(_settings(models=models, cache_dir=cache_dir)))


@models.command()
def fetch(names: Names = None, models: ModelsFile = None, cache_dir: CacheDir = None) -> None:
    """Fetch and prepare weights, except those that are prepared already."""
    from server.commands.models import fetch_models as run

    raise typer.Exit(run(_settings(models=models, cache_dir=cache_dir), names or []))


def run(command: typer.Typer) -> None:
    """Run a command; what the operator can fix is one sentence on stderr and exit code 1, never a traceback."""
    from engine.api.errors import EngineError
    from server.config.errors import ConfigError

    try:
        command()
        return
    except (ConfigError, EngineError) as error:
        sentence = str(error)
    except OSError as error:
        from server.commands.terminal import os_sentence

        sentence = os_sentence(error)
    print(f"castor: {sentence}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    """The entry point ``castor``."""
    run(app)


def _settings(**options: Any) -> Settings:
    from server.config.settings import Settings

    return Settings.from_env(os.environ, **options)


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return tuple(values) if values else None


if __name__ == "__main__":
    main()
