"""Golden answers of the real built-in model, for one machine before and after a change.

``PYTHONPATH=.:tests python -m support.golden_builtin FILE`` writes FILE where it is not there, and else compares with
it: exit code 1 and a difference where an answer is another one. Nothing of it is committed, because the last digits of
log-probabilities, and now and then a word, differ between processors. How the tokens of a stream share chunks is a
matter of time, so a stream is kept as its text and its last chunk.
"""

from __future__ import annotations

import json
import sys
from difflib import unified_diff
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.golden import Words
from support.server import RunningServer, running_server

QUESTION = {"contents": [{"role": "user", "parts": [{"text": "Name three animals that live in rivers."}]}]}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]},
}
SCHEMA = {"type": "OBJECT", "properties": {"animal": {"type": "STRING"}, "legs": {"type": "INTEGER"}}}
ANY = {"functionCallingConfig": {"mode": "ANY"}}
GENERATE, STREAM, COUNT = "generateContent", "streamGenerateContent", "countTokens"
SSE = f"{STREAM}?alt=sse"


def _asking(request: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    return {**(request or QUESTION), "generationConfig": {"temperature": 0, "maxOutputTokens": 24, **config}}


_CALL = {"contents": "What is the weather in Paris and in Rome?", "tools": [{"functionDeclarations": [WEATHER]}]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (GENERATE, _asking()),
    "greedy again, from the prefix cache": (GENERATE, _asking()),
    "a long answer": (GENERATE, _asking(maxOutputTokens=200)),
    "a system instruction": (GENERATE, _asking({**QUESTION, "systemInstruction": "Answer in capitals."})),
    "seeded": (GENERATE, _asking(temperature=0.9, topP=0.9, topK=40, seed=4711)),
    "two candidates": (GENERATE, _asking(temperature=1, seed=7, candidateCount=2)),
    "log-probabilities": (GENERATE, _asking(responseLogprobs=True, logprobs=3, maxOutputTokens=6)),
    "stop sequences": (GENERATE, _asking(stopSequences=["\n", ","])),
    "penalties": (GENERATE, _asking(presencePenalty=1.5, frequencyPenalty=1, maxOutputTokens=60)),
    "negative penalties": (GENERATE, _asking(presencePenalty=-2, frequencyPenalty=-2, seed=1, temperature=0.5)),
    "a schema": (GENERATE, _asking(responseMimeType="application/json", responseSchema=SCHEMA, maxOutputTokens=60)),
    "an enum": (
        GENERATE,
        _asking(responseMimeType="text/x.enum", responseSchema={"type": "STRING", "enum": ["otter", "whale"]}),
    ),
    "JSON without a schema": (GENERATE, _asking(responseMimeType="application/json", maxOutputTokens=60)),
    "calls": (GENERATE, {**_asking(_CALL, maxOutputTokens=120), "toolConfig": ANY}),
    "calls in a stream": (SSE, {**_asking(_CALL, maxOutputTokens=120), "toolConfig": ANY}),
    "tools that need not be called": (GENERATE, _asking(_CALL, maxOutputTokens=60)),
    "a thinking budget": (GENERATE, _asking(thinkingConfig={"thinkingBudget": 512})),
    "server-sent events": (SSE, _asking(maxOutputTokens=40)),
    "a JSON array": (STREAM, _asking(maxOutputTokens=40)),
    "two candidates in a stream": (SSE, _asking(temperature=1, seed=7, candidateCount=2)),
    "log-probabilities in a stream": (SSE, _asking(responseLogprobs=True, logprobs=2, maxOutputTokens=6)),
    "a count": (COUNT, QUESTION),
    "a count with tools": (COUNT, {"generateContentRequest": {"model": "models/smollm2-135m-instruct", **_CALL}}),
    "a refusal": (GENERATE, _asking(topK="x", mediaResolution="MEDIA_RESOLUTION_LOW")),
}


def answered(server: RunningServer) -> str:
    """The answers to all cases, one after the other: a line of JSON for each."""
    lines = []
    for name, (method, body) in CASES.items():
        answer = server.client.post(f"/v1beta/models/smollm2-135m-instruct:{method}", json=body)
        headers = {key: value for key, value in answer.headers.items() if key == "x-castor-ignored"}
        text = Words().masked(answer.text)
        told: Any = json.loads(text) if answer.status_code != 200 or method in (GENERATE, COUNT) else _joined(text)
        lines.append(json.dumps({"case": name, "status": answer.status_code, **headers, "body": told}) + "\n")
    return "".join(lines)


def _joined(body: str) -> dict[str, Any]:
    """What a stream says in all: the text and the log-probabilities of each candidate, the calls, and the last chunk
    without its share of these."""
    array = body.startswith("[")
    chunks = json.loads(body if array else f"[{body.replace('data: ', ',').lstrip(',')}]")
    texts: dict[int, str] = {}
    others: list[Any] = []
    for chunk in chunks:
        for candidate in chunk["candidates"]:
            for part in candidate.get("content", {}).pop("parts", ()):
                texts[candidate["index"]] = texts.get(candidate["index"], "") + part.get("text", "")
                others += [part] if "text" not in part else []
            others += candidate.pop("logprobsResult", {}).get("chosenCandidates", ())
    return {"texts": texts, "others": others, "last": chunks[-1]}


def main(path: Path) -> int:
    """1 where an answer differs from what is kept in ``path``."""
    with TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        found = answered(server)
    if not path.exists():
        path.write_text(found, "utf-8")
        return 0
    lines = path.read_text("utf-8").splitlines(), found.splitlines()
    difference = list(unified_diff(*lines, "golden", "answered", n=0, lineterm=""))
    print("\n".join(difference) or f"{len(CASES)} answers are the golden ones")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
