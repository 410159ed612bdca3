"""How a model's first answers read under several sampling defaults: how many run in loops, and whether a fact is right.

    .venv/bin/python benchmarks/first_answers.py [--seeds 3] [--tokens 400] [--capitals 50] [--output FILE]

Each candidate is served as an entry of models.yaml with these defaults, and asked the prompts of a newcomer without any
sampling field but a seed. Prints a row for each candidate; the file has all answers, to be read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.harness.contenders import Sizes, castor, started
from benchmarks.harness.machine import choice_of
from benchmarks.harness.programs import ROOT
from server.bench.wire.client import BaseUrl
from server.config.models_file import load_specs
from server.config.settings import Settings

CANDIDATES: dict[str, dict[str, float]] = {
    "0.6 / 0.9 / 40": {"temperature": 0.6, "top_p": 0.9, "top_k": 40},
    "0.4 / 0.9 / 40, penalty 1.1": {"temperature": 0.4, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1},
    "0.2 / 0.9": {"temperature": 0.2, "top_p": 0.9},
    "0.2 / 0.9, penalty 1.1": {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1},
    "0.2 / 0.5": {"temperature": 0.2, "top_p": 0.5},
    "0.2 / 0.5, penalty 1.05": {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.05},
    "0.2 / 0.5, penalty 1.08": {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.08},
    "0.2 / 0.5, penalty 1.1": {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.1},
    "0.2 / 0.5, penalty 1.12": {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.12},
    "greedy": {"temperature": 0},
    "greedy, penalty 1.1": {"temperature": 0, "repetition_penalty": 1.1},
}
CAPITAL = "What is the capital of France?"
PROMPTS: tuple[tuple[str, ...], ...] = (  # a turn of the user, or the turns of a conversation up to its next answer
    (CAPITAL,),
    ("Hi!",),
    ("Who are you and what can you do?",),
    ("Tell me a story about a lighthouse.",),
    ("Write a short poem about autumn.",),
    ("List five fruits.",),
    ("Give me three tips to sleep better.",),
    ("Write a Python function that reverses a string.",),
    ("Translate to French: Good morning, my friend.",),
    ("Tell me a joke.",),
    ("Write an e-mail to my boss to ask for a day off on Friday.",),
    ("What is 17 + 25?",),
    (
        "Summarize in one sentence: The lighthouse of Skagen was built in 1858. It is 46 metres tall, and its light "
        "can be seen 37 kilometres away. Since 2017 it houses a centre for migrating birds.",
    ),
    ("You are a pirate. Greet your crew.",),
    ("Answer in JSON with the keys name and age: Anna is 31 years old.",),
    ("Explain photosynthesis to a child.",),
    ("What is the difference between a cat and a dog?",),
    ("How do I boil an egg?",),
    (CAPITAL, "The capital of France is Paris.", "And of Italy?"),
    ("My name is Anna and I like chess.", "Nice to meet you, Anna! Chess is a great game.", "What is my name?"),
)
LOOPS_BELOW = 0.6
"""An answer with a smaller share of different 4-grams of words runs in a loop, judged by reading those around it."""
STREAMS = 16
ANSWER_SECONDS = 600


def main() -> None:
    """Ask every candidate everything, print the rows, write the answers."""
    parser = argparse.ArgumentParser(description="Compare sampling defaults by the first answers of a newcomer.")
    parser.add_argument("--seeds", type=int, default=3, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=400, help="the longest answer")
    parser.add_argument("--capitals", type=int, default=50, help="how often the capital of France is asked")
    parser.add_argument("--only", action="append", choices=CANDIDATES, help="a candidate; all unless given")
    parser.add_argument("--output", type=Path, default=Path("first-answers.json"))
    options = parser.parse_args()
    found = {}
    for name in options.only or CANDIDATES:
        found[name] = candidate(CANDIDATES[name], options)
        options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False), "utf-8")
    print(f"all answers: {options.output}")


def candidate(defaults: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """The answers of the first entry of models.yaml under these defaults, and what is counted of them."""
    settings = Settings.from_env(os.environ)
    spec = load_specs(ROOT / "models.yaml")[0]
    entry = {"source": spec.source, "sha256": spec.sha256, **defaults}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder, "models.yaml")
        models.write_text(yaml.safe_dump({"models": {spec.name: entry}}), "utf-8")
        contender = castor(load_specs(models)[0], settings, models)
        sizes = Sizes(STREAMS, 2048, choice_of(spec).threads)
        with started(contender, sizes) as target, ThreadPoolExecutor(STREAMS) as pool:
            ask = partial(answer, target.url, spec.name, options.tokens)
            asked = [(turns, seed) for turns in PROMPTS for seed in range(options.seeds)]
            answers = list(pool.map(ask, *zip(*asked, strict=True)))
            capitals = list(pool.map(ask, [(CAPITAL,)] * options.capitals, range(1000, 1000 + options.capitals)))
    counted = {
        "loops": sum(distinct(text) < LOOPS_BELOW for text, _ in answers),
        "cut off": sum(reason == "MAX_TOKENS" for _, reason in answers),
        "empty": sum(not text.strip() for text, _ in answers),
        "answers": len(answers),
        "distinct": round(fmean(distinct(text) for text, _ in answers), 3),
        "Paris": sum("Paris" in text for text, _ in capitals),
        "capitals": len(capitals),
    }
    print(json.dumps(defaults | counted), flush=True)
    texts = [
        {"asked": turns[-1], "seed": seed, "distinct": round(distinct(text), 3), "ended": reason, "answer": text}
        for (turns, seed), (text, reason) in zip(asked, answers, strict=True)
    ]
    return {"defaults": defaults, "counted": counted, "answers": texts, "capitals": [text for text, _ in capitals]}


def answer(url: BaseUrl, model: str, tokens: int, turns: tuple[str, ...], seed: int) -> tuple[str, str]:
    """The text of an answer and why it ended."""
    contents = [{"role": ("user", "model")[place % 2], "parts": [{"text": text}]} for place, text in enumerate(turns)]
    body = {"contents": contents, "generationConfig": {"maxOutputTokens": tokens, "seed": seed}}
    place = f"{url}/v1beta/models/{model}:generateContent"
    request = urllib.request.Request(place, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        found = json.load(response)["candidates"][0]
    return "".join(part.get("text", "") for part in found["content"].get("parts", ())), found["finishReason"]


def distinct(text: str) -> float:
    """The share of different ones among the 4-grams of words; 1 where there are few words."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
    return len(set(grams)) / len(grams) if len(grams) >= 10 else 1.0


if __name__ == "__main__":
    main()
