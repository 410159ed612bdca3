"""What is known of a model before its weights are loaded: made by ``engine.check``, shown by ``castor check``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model on a device, as far as its files tell; what they do not tell is None, or empty.

    ``refused`` is why it cannot be served at all, ``too_large`` why not on this device, ``no_device`` why that is not
    here; each is one sentence, or empty.
    ``undecided`` is what only the weights will show. Sizes are bytes, in the types that would be loaded.
    """

    refused: str = ""
    too_large: str = ""
    no_device: str = ""
    undecided: str = ""
    class_name: str = ""
    model_type: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    """Those that one token uses, of a mixture of experts."""
    layers: tuple[tuple[str, int], ...] = ()
    """Kinds of layers and how many there are of each."""
    inputs: tuple[str, ...] = ()
    """What the class can take in: text, image, audio, video."""
    weights_dtype: str = ""
    weights_bytes: int | None = None
    weights_by_choice: tuple[tuple[str, int], ...] = ()
    """What each choice of ``quantize`` makes of ``weights_bytes``; empty where there is no choice."""
    kv_dtype: str = ""
    kv_bytes_per_token: int | None = None
    state_bytes: int | None = None
    """What recurrent layers carry for one sequence; 0 where none does."""
    block_size: int | None = None
    context: int | None = None
    """The context that ``context_bytes`` are for, in tokens."""
    context_bytes: int | None = None
    longest_context: int | None = None
    context_limit: str = ""
    """What shortened the longest context, if anything did."""
    cache_tokens: int | None = None
    """About how many tokens of keys and values fit beside the weights now, if nothing else is set."""
    device: str = ""
    device_bytes: int | None = None
    free_bytes: int | None = None
    native: bool | None = None
    not_native: str = ""

    @property
    def problem(self) -> str:
        """Why the model cannot be served here; empty if it can."""
        return self.refused or self.too_large or self.no_device

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def report_from(content: dict[str, Any]) -> ModelReport:
    """A report as its JSON says."""
    pairs = {
        name: tuple((str(kind), int(count)) for kind, count in content[name])
        for name in ("layers", "weights_by_choice")
    }
    return ModelReport(**{**content, **pairs, "inputs": tuple(content["inputs"])})
