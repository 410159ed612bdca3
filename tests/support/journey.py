"""The modules that one generateContent passes from its route to the engine: PYTHONPATH=.:tests python -P FILE

Prints a JSON list. A module of ``server`` or ``engine`` is visited when one of its functions is called from another
module (the nearest caller of the two packages; code of libraries between them does not count). Going on after a call
has ended, or after an await, is no visit; neither is a call of what a library generated (the constructor of a
dataclass). Visits of the same module in a row are one. The journey begins with the first call into ``server.routes``
and ends where ``submit`` of the scripted engine is called. A first request, not recorded, does the late imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType

from support.fakes import ScriptedEngine, serving, tokenizer_folder

import server

ROOT = Path(server.__file__).parents[1]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("server", "engine"))
BODY = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
    "generationConfig": {"temperature": 0.5, "topK": 3, "maxOutputTokens": 8},
}


class Recorder:
    """A profile function that keeps the visits between the route and the engine, in every thread."""

    def __init__(self, last: CodeType) -> None:
        self.visits: list[str] = []
        self._last = last
        self._ended = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # The argument of RESUME is 0 where a function begins, and not where it goes on after an await or a yield.
        if event != "call" or self._ended or code.co_code[frame.f_lasti + 1] != 0:
            return
        if code is self._last:
            self._ended = True
            return
        module = _module(frame)
        if module is None or not (self.visits or module.startswith("server.routes")):
            return
        caller = frame.f_back
        while caller is not None and _module(caller) is None:
            caller = caller.f_back
        if (caller is None or _module(caller) != module) and self.visits[-1:] != [module]:
            self.visits.append(module)


def _module(frame: FrameType) -> str | None:
    """The name of the module that the function stands in, if it is one of the two packages."""
    return frame.f_globals["__name__"] if frame.f_code.co_filename.startswith(FOLDERS) else None


async def journey(folder: Path) -> list[str]:
    """The visits of one request, in their order; ``folder`` is empty and takes what the application writes."""
    async with serving(tokenizer_folder(folder)) as harness:
        (await harness.generate(BODY)).raise_for_status()
        recorder = Recorder(ScriptedEngine.submit.__code__)
        threading.setprofile(recorder)
        sys.setprofile(recorder)
        try:
            (await harness.generate(BODY)).raise_for_status()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return recorder.visits


if __name__ == "__main__":
    # The log goes to stdout.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        passed = asyncio.run(journey(Path(scratch)))
    print(json.dumps(passed))
