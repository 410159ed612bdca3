"""``castor bench URL``: puts load on a running server and measures its answers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from server.bench.environment import describe
from server.bench.load import Target
from server.bench.options import Options
from server.bench.plans import plan_of
from server.bench.results.report import ReportContent
from server.bench.rounds import measure_running
from server.bench.run import check_folder, run
from server.bench.scenarios import SCENARIOS
from server.bench.wire.client import HttpError, get, parse_url
from server.bench.wire.protocols import Gemini
from server.commands.terminal import console
from server.config.errors import ConfigError
from server.config.settings import Settings, is_loopback

ROOT = Path(__file__).resolve().parents[2]
MODELS_PATH = "/v1beta/models"
CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(Options):
    """The options of a run on a server that is already running."""

    url: str | None = None
    api_key: str | None = None


def bench(options: BenchOptions, settings: Settings) -> int:
    """Measure, print, and leave the JSON and the plots in the folder. Raises ``ConfigError``."""
    if options.url is None:
        raise ConfigError(
            "give the URL of a running server, or, to start and compare servers on this machine, "
            "run ./scripts/bench from a checkout"
        )
    scenario = SCENARIOS.get(options.scenario)
    if scenario is None:
        raise ConfigError(
            f"the scenario {options.scenario!r} is unknown; for a running server there are {', '.join(SCENARIOS)}, "
            "and ./scripts/bench in a checkout has those that measure this machine beside the server"
        )
    # The server may still have the prompts of an earlier run in its prefix cache.
    plan = plan_of(options, scenario, default_seed=random.randrange(10_000))
    check_folder(options.output)
    terminal = console()
    terminal.print(f"{plan.scenario}: {scenario.question}", soft_wrap=True)
    target = asyncio.run(running_target(options, options.url, next(iter(settings.api_keys), None)))
    content = ReportContent(scenario, plan, describe(["castor", *sys.argv[1:]], {}, ROOT))
    run(content, lambda note: measure_running(scenario, plan, target, note), options.output, terminal)
    return 0


async def running_target(options: BenchOptions, text: str, own_key: str | None = None) -> Target:
    """The server at a URL and the model to measure: the one that was named, or the first that it lists.

    ``own_key`` is only sent to a server on this machine: no other server gets a key that was not given for it.
    """
    url, dialect = parse_url(text), Gemini()
    key = options.api_key or (own_key if is_loopback(url.host) else None)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            status, body = await get(url, MODELS_PATH, dialect.headers(key))
    except TimeoutError:
        raise ConfigError(f"no server answers at {url} within {CONNECT_SECONDS:.0f} s; is it overloaded?") from None
    except ssl.SSLError as error:  # an OSError, but its number is not one of the system's
        raise ConfigError(f"no TLS with {url}: {tls_reason(error)}") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"no server answers at {url}: {reason}; start one: castor serve") from None
    except HttpError as error:
        raise ConfigError(f"no server answers at {url}: {error}") from None
    target = Target("server", url, dialect, options.model or "", key)
    if options.model:
        return target
    try:
        models = json.loads(body)["models"] if status == 200 else []
        return replace(target, model=str(models[0]["name"]).removeprefix("models/"))
    except (ValueError, LookupError, TypeError):
        said = body.decode(errors="replace").replace("\n", " ")[:200]
        raise ConfigError(
            f"{url} lists no models, but answers HTTP {status}: {said}; name one with --model, a key with --api-key"
        ) from None


def tls_reason(error: ssl.SSLError) -> str:
    """What is wrong with a certificate, or else why there is no TLS, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    reason = (error.reason or str(error)).lower().replace("_", " ")
    return f"{reason}; does it speak http:// instead?" if "wrong version" in reason else reason
