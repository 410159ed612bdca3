"""models.yaml: which models are served, from where and within which limits; read once into frozen specs."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from engine.api.engine import KV_DTYPES, QUANTIZE
from engine.api.errors import SourceError
from engine.api.sampling import SAMPLING_FIELDS, Range
from engine.weights.sources import FolderSource, GgufSource, HubSource, PackageSource, Source, parse_source
from server.config.errors import ConfigError, did_you_mean

GLOB_CHARACTERS = frozenset("*?[")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class ThinkingLevels:
    """The tokens of thoughts that each ``thinkingLevel`` allows; -1 leaves the amount to the model."""

    minimal: int = 512
    low: int = 1024
    medium: int = 4096
    high: int = 16384
    xhigh: int = 32768


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One entry of models.yaml: a model as its operator wants it served.

    ``max_context`` None means the model's own. ``kv_memory`` is a share of the free GPU memory up to 1, else bytes;
    ``kv_dtype`` is the type that keys and values are kept in, "auto" that of the model. ``max_running`` None means the
    default of the device. ``max_output_tokens`` is the limit of requests that name none. ``request_timeout`` is in
    seconds. ``temperature``, ``top_p``, ``top_k``, ``min_p`` and ``repetition_penalty`` are the defaults of requests
    that name none; None leaves them to the model's generation_config.json, and then to the server. ``base`` is the
    folder that a relative path in ``source`` counts from: that of the file. ``thinking_levels`` in the file override
    the defaults one by one. ``lenient`` are the fields of requests that are accepted without effect. ``strict_schemas``
    refuses schemas that the grammar of an answer cannot enforce. ``native`` lets C code compute the model on a CPU
    where it can. ``quantize`` packs safetensors at the load, so that they take less memory there.
    """

    name: str
    source: str
    sha256: str | None = None
    aliases: tuple[str, ...] = ()
    load: str = "start"
    dtype: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    kv_memory: float | None = None
    kv_dtype: str = "auto"
    cuda_graphs: bool = True
    max_running: int | None = None
    max_waiting: int = 256
    max_output_tokens: int = 8192
    request_timeout: float = 600.0
    display_name: str = ""
    description: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    thinking_levels: ThinkingLevels = ThinkingLevels()
    lenient: tuple[str, ...] = ()
    strict_schemas: bool = False
    native: bool = True
    quantize: str = "none"
    base: Path = Path()

    def where(self) -> Source:
        """Where the weights come from. Raises ``SourceError``."""
        return parse_source(self.source, self.base)


def load_specs(path: Path) -> list[ModelSpec]:
    """The entries of a models.yaml in file order. Raises ``ConfigError`` naming entry, key, value and limit."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"the models file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the models file {path} is not UTF-8 text") from None
    return parse_specs(text, str(path), path.parent)


def parse_specs(text: str, where: str = "models.yaml", base: Path = Path()) -> list[ModelSpec]:
    """As ``load_specs``, from the file's text; ``where`` names it in errors."""
    try:
        document = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = (getattr(error, "problem", None) or str(error)).replace("\n", " ")
        raise ConfigError(f"{where} is not valid YAML: {place}{problem}") from None
    if not isinstance(document, dict) or set(document) != {"models"}:
        raise ConfigError(f"{where} must hold one key, 'models', with the models under it")
    entries = document["models"]
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{where} names no model under 'models'")
    specs = [_spec(name, values, where, base) for name, values in entries.items()]
    check_names(specs, where)
    return specs


def spec_of_path(path: Path) -> ModelSpec:
    """The entry of a model that is served without a models.yaml, named after its folder or file.

    It answers to every Gemini name too, so that code written for the cloud runs unchanged.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.removesuffix(".gguf")).strip(".-_") or "model"
    if not path.exists():
        raise ConfigError(f"there is no model at {path}: pass a model folder or a .gguf file")
    return ModelSpec(name=re.sub(r"\.\.+", ".", name), source=str(path.resolve()), aliases=("gemini-*",))


def is_glob(alias: str) -> bool:
    """Whether an alias is a pattern (``gemini-*``) and not a name."""
    return not GLOB_CHARACTERS.isdisjoint(alias)


def literal_length(pattern: str) -> int:
    """How many characters of a name a pattern spells out: those outside ``*``, ``?`` and ``[...]``."""
    return len(re.sub(r"\[!?\]?[^\]]*\]|[*?]", "", pattern))


def check_names(specs: Sequence[ModelSpec], where: str) -> None:
    """Raise ``ConfigError`` where one name or alias would mean two models, or two aliases of one model are the same."""
    owners: dict[str, str] = {spec.name: spec.name for spec in specs}
    for spec in specs:
        for alias in spec.aliases:
            if alias in owners:
                raise ConfigError(f"{where}, entry {spec.name!r}: the alias {alias!r} already means {owners[alias]!r}")
            owners[alias] = spec.name


class _UniqueKeys(yaml.SafeLoader):
    """YAML's plain values; a key that occurs twice in one mapping is an error and does not silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, name in enumerate(names):
            if name in names[:position]:
                problem = f"the key {name!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _spec(name: Any, values: Any, where: str, base: Path) -> ModelSpec:
    here = f"{where}, entry {name!r}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", name) or ".." in name:
        raise ConfigError(
            f"{here}: a name must be made of letters, digits and . _ - : / @ +, start with a letter or digit and not "
            "hold '..'"
        )
    if not isinstance(values, dict):
        raise ConfigError(f"{here}: must be a mapping with at least the key 'source'")
    given = {key: _value(here, key, value) for key, value in values.items()}
    if "source" not in values:
        raise ConfigError(f"{here}: the key 'source' is missing; it says where the weights come from")
    spec = ModelSpec(name=name, base=base, **{key: value for key, value in given.items() if value is not None})
    try:
        source = spec.where()
    except SourceError as error:
        raise ConfigError(f"{here}: {error}") from None
    if isinstance(source, PackageSource) and spec.sha256 is None:
        raise ConfigError(f"{here}: a pypi: source needs the key 'sha256', the hash of its GGUF file")
    if isinstance(source, FolderSource | HubSource) and spec.sha256 is not None:
        raise ConfigError(f"{here}: sha256 belongs to a GGUF file; a folder or hf: source has none, remove it")
    if isinstance(source, PackageSource | GgufSource) and spec.quantize != "none":
        raise ConfigError(f"{here}: quantize packs safetensors; a GGUF file is quantised already, remove it")
    return spec


def _value(here: str, key: Any, value: Any) -> Any:
    """One key's value, checked, as frozen specs hold it: tuples, and a hash in lower case."""
    if key not in _RULES:
        near = did_you_mean(str(key), _RULES)
        raise ConfigError(f"{here}: the key {key!r} is unknown{near}; the known ones are {', '.join(_RULES)}")
    holds, expected = _RULES[key]
    if value is None and key in _OPTIONAL:
        return None
    if not holds(value):
        raise ConfigError(f"{here}: {key} is {value!r}, but must be {expected}")
    if key in ("aliases", "lenient"):
        return tuple(value)
    if key == "thinking_levels":
        return ThinkingLevels(**value)
    return value.lower() if key == "sha256" else value


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(within: Range, *, whole: bool = False) -> Callable[[Any], bool]:
    kinds = int if whole else (int, float)
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool) and value in within


_LEVELS = tuple(f.name for f in fields(ThinkingLevels))


_POSITIVE = (_number(Range(1), whole=True), "a whole number of at least 1")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "source": (_text, "a folder, a .gguf file, hf:ORG/NAME or pypi:PACKAGE==VERSION/PATH"),
    "sha256": (lambda v: isinstance(v, str) and re.fullmatch("[0-9a-fA-F]{64}", v) is not None, "64 hex digits"),
    "aliases": (
        lambda v: (
            isinstance(v, list)
            and all(isinstance(alias, str) and re.fullmatch(r"[A-Za-z0-9._:/@+*?\[\]-]+", alias) for alias in v)
        ),
        "a list of names or patterns",
    ),
    "load": (lambda v: v in ("start", "request"), "start or request"),
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "device": (_text, "auto or the name of a torch device, as cpu or cuda:0"),
    "max_context": _POSITIVE,
    "kv_memory": (_number(Range(0, excluded=True)), "a share of the free GPU memory up to 1, or a number of bytes"),
    "kv_dtype": (lambda v: v in KV_DTYPES, f"one of {', '.join(KV_DTYPES)}"),
    "cuda_graphs": (lambda v: isinstance(v, bool), "true or false"),
    "max_running": _POSITIVE,
    "max_waiting": (_number(Range(0), whole=True), "a whole number of at least 0"),
    "max_output_tokens": _POSITIVE,
    "request_timeout": (_number(Range(0, 86400, excluded=True)), "seconds, above 0 and at most 86400"),
    "display_name": (_text, "a text"),
    "description": (_text, "a text"),
    **{
        name: (
            _number(field.asked, whole=field.counts_tokens),
            f"a {'whole number' if field.counts_tokens else 'number'} {field.asked}",
        )
        for name, field in SAMPLING_FIELDS.items()
        if field.in_entry
    },
    "lenient": (
        lambda v: isinstance(v, list) and all(map(_text, v)),
        "a list of fields by their JSON path, as generationConfig.speechConfig",
    ),
    "strict_schemas": (lambda v: isinstance(v, bool), "true or false"),
    "native": (lambda v: isinstance(v, bool), "true or false"),
    "quantize": (lambda v: v in QUANTIZE, f"one of {', '.join(QUANTIZE)}"),
    "thinking_levels": (
        lambda v: (
            isinstance(v, dict) and set(v) <= set(_LEVELS) and all(map(_number(Range(-1), whole=True), v.values()))
        ),
        f"a mapping of {', '.join(_LEVELS)} to numbers of tokens, -1 for no limit",
    ),
}
_OPTIONAL = frozenset(f.name for f in fields(ModelSpec) if f.default is None)
assert set(_RULES) == {f.name for f in fields(ModelSpec)} - {"name", "base"}
assert {f.name for f in fields(ModelSpec) if f.default is MISSING} == {"name", "source"}
