"""The process ``python -m engine.check MODEL``, with options, prints a ``ModelReport`` as JSON.

MODEL is a folder with config.json, with weights or without, or a GGUF file. ``--config`` is a JSON object of those
fields of ``EngineConfig`` that decide, ``--held`` the bytes of weights that would be fetched. Into the folder
``--details`` goes what a GGUF file says of its tokenizer and its sampling.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

from transformers.utils import logging as transformers_logging

from engine.api.engine import EngineConfig
from engine.check.model_check import report_on


def main() -> None:
    """Print the report as the last line of the output."""
    parser = argparse.ArgumentParser(prog="python -m engine.check")
    parser.add_argument("model", type=Path)
    parser.add_argument("--held", type=int)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--details", type=Path)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    report = report_on(EngineConfig(path=str(given.model), **given.config), given.held, given.details)
    print(json.dumps(report.as_json()))


if __name__ == "__main__":
    main()
