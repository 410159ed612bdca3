"""Runs prompts through llama.cpp's package xllamacpp, for the environment that has it and nothing else.

    python ask_llama_cpp.py MODEL.gguf TOKENS < PROMPTS

``PROMPTS`` is a JSON list of lists of token ids; printed is, for each one, the ``TOKENS`` that follow greedily, and the
logarithms of the probabilities of the whole vocabulary before each of them: [[[token, [log-probability, ...]], ...]].
With ``TOKENS`` 0 the prompts are texts, and printed are their token ids.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    path, tokens = sys.argv[1], int(sys.argv[2])
    server = xllamacpp.Server(parameters(path))
    answers = [ask(server, prompt, tokens) for prompt in json.load(sys.stdin)]
    print(json.dumps(answers), flush=True)
    os._exit(0)  # the server's own end now and then waits for ever


def parameters(path: str) -> Any:
    """Computes with float32 as far as llama.cpp can: no flash attention, keys and values in full."""
    told = xllamacpp.CommonParams()
    told.model.path = path
    told.hostnames = ["127.0.0.1"]
    told.port = 0
    told.n_ctx, told.n_parallel, told.warmup = 256, 1, False
    told.cpuparams.n_threads = told.cpuparams_batch.n_threads = 1
    told.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    told.cache_type_k = told.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return told


def ask(server: Any, prompt: Any, tokens: int) -> Any:
    """The answer to one prompt."""
    if not tokens:
        return post(server, "/tokenize", {"content": prompt, "add_special": False, "parse_special": False})["tokens"]
    told = {"n_predict": tokens, "n_probs": 1 << 20, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    answer = post(server, "/completion", {"prompt": prompt, **told})
    rows = []
    for step in answer["completion_probabilities"]:
        found = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
        rows.append([step["id"], [found[number] for number in range(len(found))]])
    return rows


def post(server: Any, place: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.listening_address + place, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
