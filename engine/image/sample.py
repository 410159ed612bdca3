"""A few steps of a runner as a digest: equal code on equal weights computes equal bits."""

from __future__ import annotations

import hashlib

from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.native.runner import NativeRunner
from engine.scheduling.sequence import ScheduledChunk, Sequence

TOKENS = 40
PRIME = 7919


def digest_of_logits(runner: NativeRunner) -> str:
    """Of a chunk and of a single token after it. Writes to the first blocks of the cache."""
    info = runner.info
    count = min(TOKENS, info.max_context)
    tokens = [number * PRIME % info.vocab_size for number in range(1, count + 1)]
    sequence = Sequence(Request("sample", tuple(tokens[:1]), SamplingParams(1)), 0, [])
    # Every layer group has room for so few tokens.
    sequence.blocks = list(range(-(-count // info.block_size)))
    sequence.other_tables = tuple(sequence.blocks for _ in info.groups[1:])
    digest, start = hashlib.sha256(), 0
    for end in sorted({max(1, count - 1), count}):
        sequence.tokens = tokens[:end]
        (logits,) = runner.forward([ScheduledChunk(sequence, start, end - start)])
        digest.update(logits.tobytes())
        start = end
    return digest.hexdigest()
