"""Runs a model folder through the paged path in chosen steps, and through a plain transformers forward."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.tiny import EOS_ID, SMALL, save_tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.api.block_groups import BlockGroup, Window
from engine.api.engine import EngineConfig, ModelInfo
from engine.api.requests import Request
from engine.api.sampling import SamplingParams
from engine.attention.base import AttentionBackend
from engine.attention.gather import ReferenceAttention
from engine.cache.kv_tensors import KVCache
from engine.cache.state_tensors import StateCache, slot_bytes
from engine.model.loader import LoadedModel, load_model
from engine.recurrent.states import RecurrentStates
from engine.runner.torch_runner import ModelRunner
from engine.scheduling.contracts import Runner
from engine.scheduling.sequence import ScheduledChunk, Sequence
from engine.weights.usable import GGUF_LINK

BLOCK_SIZE = 4
TOLERANCE = 1e-4
MOE_TOLERANCE = 5e-4
"""Experts with random weights are nearly tied: rounding sends a token to another one."""


def lively_model_folder(path: Path, model_type: str, liveliness: float = 6.0, **config: Any) -> Path:
    """A tiny random model whose scores are large enough for caps, scales, windows and sinks to matter.

    ``liveliness`` multiplies its weights; the larger it is, the more rounding is amplified too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[model_type](**{**SMALL, "num_hidden_layers": 4, **config}), dtype=torch.float32
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or name.endswith("correction_bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "embed" not in name:
                    parameter.mul_(liveliness)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.add_(torch.randn_like(buffer) * 0.3)
    model.save_pretrained(path)
    save_tiny_tokenizer(path)
    return path


def plain_model(folder: Path) -> Any:
    """The model as transformers runs it: eager attention, float32, no cache. It reads a GGUF file in its own way."""
    file = {} if any(folder.glob("*.safetensors")) else {"gguf_file": GGUF_LINK}
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **file).eval()


def plain_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after each token [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def texts(*lengths: int) -> list[list[int]]:
    """Random texts without special tokens: by default longer than the windows of small models, shorter than them, and
    in between."""
    rnd = random.Random(1)
    return [[rnd.randrange(3, 256) for _ in range(length)] for length in lengths or (37, 5, 19)]


def apart(found: dict[int, torch.Tensor], expected: torch.Tensor) -> float:
    """The largest difference of any logits from those that ``plain_logits`` gives."""
    assert found, "nothing was compared"
    return max((row - expected[index]).abs().max().item() for index, row in found.items())


def make_sequence(tokens: list[int], blocks: list[int], sampling: SamplingParams | None = None) -> Sequence:
    request = Request(id="r", prompt=(tokens[0],), sampling=sampling or SamplingParams(max_tokens=1))
    return Sequence(request=request, candidate=0, tokens=list(tokens), blocks=blocks)


class PagedModel:
    """A folder loaded as the engine loads it, with a small cache whose blocks are handed out at random."""

    STALE = 1e3
    """What blocks and slots held before, which must not matter."""
    NUM_SLOTS = 12

    def __init__(
        self,
        folder: Path,
        attention: Callable[[KVCache], AttentionBackend] = ReferenceAttention,
        num_blocks: int = 256,
        block_size: int = BLOCK_SIZE,
        change: Callable[[Any], object] = lambda module: None,
        max_context: int = 512,
        fp8: bool = False,
        states: Callable[[StateCache], RecurrentStates] = RecurrentStates,
    ) -> None:
        self.block_size = block_size
        loaded = load_model(EngineConfig(path=str(folder), device="cpu", dtype="float32"), lambda stage, done: None)
        change(loaded.module)
        device = torch.device("cpu")
        self.cache = cache = KVCache(
            loaded.probe.shapes, num_blocks, block_size, dtype=loaded.module.dtype, device=device, fp8=fp8
        )
        for blocks in (*cache.keys, *cache.values):
            blocks.fill_(min(self.STALE, torch.finfo(blocks.dtype).max))
        for scales in (*cache.key_scales, *cache.value_scales):
            if scales is not None:
                scales.fill_(128)
        groups = tuple(BlockGroup(num_blocks, window) for window in loaded.probe.windows)
        info = ModelInfo(
            "", 0, "float32", "cpu", loaded.probe.vocab_size, max_context, block_size, groups, 8, (EOS_ID,)
        )
        self.original = 0 if loaded.long_rope is None else loaded.long_rope.original
        info = replace(info, state_bytes=slot_bytes(loaded.probe.states), original_context=self.original)
        self.attention = attention
        self.advancing = states
        self.runner = self.make_runner(loaded, cache, info)
        self._random = random.Random(2)
        self._free = self._random.sample(range(num_blocks), num_blocks)
        # Further layer groups have, for each block of the first one, another one of their own.
        self._others = [self._random.sample(range(num_blocks), num_blocks) for _ in groups[1:]]

    def make_runner(self, loaded: LoadedModel, cache: KVCache, info: ModelInfo) -> Runner:
        states = StateCache(loaded.probe.states, self.NUM_SLOTS, torch.device("cpu"))
        for kept in states.states:
            kept.fill_(self.STALE)
        return ModelRunner(loaded, self.attention(cache), info, self.advancing(states))

    @property
    def windows(self) -> list[Window | None]:
        """Those of the layer groups."""
        return [group.window for group in self.runner.info.groups]

    def sequence(self, text: list[int], table: list[int]) -> Sequence:
        """A sequence with these blocks in the first layer group, and those for them in the others."""
        sequence = make_sequence(text, table)
        sequence.other_tables = tuple([others[block] for block in table] for others in self._others)
        return sequence

    def spoil_what_is_passed(self, sequence: Sequence, done: int) -> None:
        """Fill the blocks that no token from ``done`` on sees, as if others had got them."""
        for group, table in enumerate(sequence.tables):
            window = self.runner.info.groups[group].window
            passed = table[: window.first_seen(done) // self.block_size] if window else []
            for layer in (place for place, own in enumerate(self.cache.groups) if own == group):
                for blocks in (self.cache.keys[layer], self.cache.values[layer]):
                    blocks[list(passed)] = min(self.STALE, torch.finfo(blocks.dtype).max)

    def take_scratch(self) -> list[int]:
        """A block of each layer group for the padding of recorded steps."""
        return [table[0] for table in self.sequence([0], self.take_blocks(1)).tables]

    def take_blocks(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // self.block_size))]

    def run(
        self, texts: list[list[int]], max_chunk: int = 9, blocks: list[list[int]] | None = None, cached: int = 0
    ) -> list[dict[int, torch.Tensor]]:
        """Compute all texts side by side in random chunks; per text, logits by the index of the token before them.

        The first ``cached`` tokens are taken to lie in ``blocks`` already; all texts begin with them.
        """
        tables = blocks or [self.take_blocks(len(text)) for text in texts]
        sequences = [self.sequence(text, table) for text, table in zip(texts, tables, strict=True)]
        for place, sequence in enumerate(sequences):
            sequence.state_slot = (7 * place + 3) % self.NUM_SLOTS
            sequence.is_long = 0 < self.original < len(sequence.tokens)
        if cached:
            self._begin_with_states(texts[0][:cached], tables[0], sequences)
        done = [cached] * len(texts)
        found: list[dict[int, torch.Tensor]] = [{} for _ in texts]
        while any(count < len(text) for count, text in zip(done, texts, strict=True)):
            chunks, owners = [], []
            for i, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
                count = min(
                    self._random.choice((0, 1, 1, max_chunk, self._random.randint(2, max_chunk))), len(text) - done[i]
                )
                if count:
                    # Half of the chunks end at the last token known so far, which is what makes them sample.
                    known = done[i] + count if self._random.random() < 0.5 else len(text)
                    sequence.tokens = text[:known]
                    chunks.append(ScheduledChunk(sequence, done[i], count))
                    owners.append(i)
                    done[i] += count
            if chunks:
                rows = iter(self.runner.forward(chunks))
                for i, chunk in zip(owners, chunks, strict=True):
                    if chunk.samples:
                        found[i][done[i] - 1] = torch.as_tensor(next(rows)).clone()
                    if blocks is None:
                        self.spoil_what_is_passed(chunk.sequence, done[i])
        return found

    def _begin_with_states(self, prefix: list[int], blocks: list[int], sequences: list[Sequence]) -> None:
        """Have the sequences continue the states after ``prefix``, which are computed now."""
        free = [slot for slot in range(self.NUM_SLOTS) if slot not in {one.state_slot for one in sequences}]
        first = self.sequence([*prefix, 0], blocks)
        first.state_slot, snapshot = free[:2]
        first.is_long = sequences[0].is_long
        self.runner.forward([ScheduledChunk(first, 0, len(prefix), snapshot)])
        for sequence in sequences:
            sequence.state_start, sequence.state_source = len(prefix), snapshot


def apart_in_chunks(paged: PagedModel, plain: Any, compared: list[list[int]], chunks: tuple[int, ...]) -> float:
    """How far logits are from a plain forward: side by side in chunks of at most so many tokens, and alone."""
    expected = [plain_logits(plain, text) for text in compared]
    worst = [
        apart(found, logits)
        for chunk in chunks
        for found, logits in zip(paged.run(compared, chunk), expected, strict=True)
    ]
    worst += [apart(paged.run([text])[0], logits) for text, logits in zip(compared, expected, strict=True)]
    return max(worst)


def apart_after_shared_pages(paged: PagedModel, plain: Any) -> float:
    """How far the logits of two texts are that begin with five blocks which another sequence has filled."""
    first, _, third = texts()
    shared = 5 * BLOCK_SIZE
    blocks = paged.take_blocks(len(first))
    paged.run([first], blocks=[blocks])
    pair = [first, first[:shared] + third]
    tables = [blocks[:5] + paged.take_blocks(len(text) - shared) for text in pair]
    found = paged.run(pair, blocks=tables, cached=shared)
    return max(apart(rows, plain_logits(plain, text)) for rows, text in zip(found, pair, strict=True))
