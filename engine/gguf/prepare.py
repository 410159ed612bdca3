"""Prepares the folder of a GGUF file: config, tokenizer and a link to the file, in a process of its own.

Run as ``python -m engine.gguf.prepare IN.gguf OUT_DIR``. The weights stay where they are. Standard output carries lines
``progress FRACTION`` and, where it fails, ``error SENTENCE``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine.failures import NOT_FAILURES, refused_as
from engine.gguf.architectures import changes_of, config_of
from engine.gguf.header import Header, Unreadable, read_header
from engine.gguf.tokenizer import generation_of, require_known_tokenizer, write_tokenizer
from engine.gguf.weights import stored_dtype, stored_weights
from engine.model.eligibility import described, require_eligible
from engine.model.refusals import advised
from engine.model.rehearsal import rehearse
from engine.weights.usable import GGUF_LINK

NOT_WEIGHTS = ("rope_freqs.", "rope_factors_", "mtp.")
"""What is no weight of the model: factors that its configuration has, and layers that guess tokens ahead."""


def prepare(source: Path, target: Path) -> None:
    """Make ``target`` a folder that serves ``source``.

    Raises ``ModelRefused``, before anything is made, for a model that cannot be served, and where something that
    changes what the model computes or reads is not known.
    """
    config, header = describe(source)
    with advised(config):
        require_eligible(config)
    require_tensors(header, config)
    rehearse(config)
    report(0.2)
    link = target / GGUF_LINK
    link.symlink_to(source.resolve())
    write_details(link, header)
    report(0.9)
    config.save_pretrained(target)
    report(1.0)


def describe(source: Path) -> tuple[Any, Header]:
    """The configuration of the model in a file and its header. Raises ``Unreadable``."""
    header = read_header(source)
    with refused_as(f"what the header of {source.name} says of the model cannot be read"):
        config = config_of(header)
    require_known_tokenizer(header)
    config.dtype = stored_dtype(header)
    config._attn_implementation = "eager"  # as of any other model that is only looked at
    return config, header


def require_tensors(header: Header, config: Any) -> None:
    """Raises ``Unreadable`` where the file lacks tensors of the model, has others, or some of other shapes."""
    model = described(config)
    stored = stored_weights(header, changes_of(header, config))
    tied = getattr(model, "all_tied_weights_keys", {})
    wanted = {name: weight.shape for name, weight in model.named_parameters() if name not in tied}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise Unreadable(f"it has no tensor for {', '.join(missing[:3])}")
    known = {*wanted, *tied, *(name for name, _ in model.named_buffers())}
    if more := sorted(name for name in stored.keys() - known if not name.startswith(NOT_WEIGHTS)):
        # Silently left out, it would be another model: a bias that its class does not have, for example.
        raise Unreadable(f"it has a tensor {more[0]} that {type(model).__name__} has no place for")
    for name, shape in wanted.items():
        with refused_as(f"its tensor of {name} does not fit its metadata"):
            found = stored[name].shape()
        if found != shape:
            raise Unreadable(f"its metadata describe {name} as {list(shape)}, but its tensor is {list(found)}")


def write_details(link: Path, header: Header) -> None:
    """Write what the header says of the tokenizer, the chat template and the sampling beside ``link``."""
    with refused_as("its tokenizer cannot be read"):
        write_tokenizer(link, header)
    content = json.dumps(generation_of(header.metadata), indent=2)
    link.with_name("generation_config.json").write_text(content, "utf-8")


def report(fraction: float) -> None:
    print(f"progress {fraction:.2f}", flush=True)


def main() -> int:
    """Prepare; every failure becomes one line that the parent process shows to its user."""
    source, target = map(Path, sys.argv[1:])
    try:
        prepare(source, target)
    except NOT_FAILURES:
        raise
    except BaseException as error:  # noqa: BLE001 - the process main: any error of a broken file becomes one sentence
        print(f"error {' '.join(str(error).split()) or type(error).__name__}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
