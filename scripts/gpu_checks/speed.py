"""How fast, as shares of what the device itself was measured to do in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.batch import Sequence, Work
from engine.model import LoadedModel
from engine.runner import ModelRunner
from engine.sampling import BatchSampler
from gpu_checks.setup import Machine, Pages, make_runner, random_model, uses

# Memory bandwidth by the makers' datasheets, in GB/s; the first line whose words are all in the device's name counts.
DATASHEET: tuple[tuple[str, float], ...] = (
    ("B200", 8000),
    ("GH200", 4000),
    ("H200", 4800),
    ("H100 NVL", 3938),
    ("H100 PCIe", 2000),
    ("H100", 3350),
    ("A100 80GB SXM4", 2039),
    ("A100 80GB PCIe", 1935),
    ("A100", 1555),
    ("L40S", 864),
    ("L40", 864),
    ("L4", 300),
    ("A10G", 600),
    ("A10", 600),
    ("RTX 5090", 1792),
    ("RTX 4090", 1008),
    ("RTX 3090", 936),
    ("RTX A6000", 768),
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The published configurations of the two models.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
}
SMOKE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured: sequences at once, tokens of prompt and answer, and tokens of prefill in a step."""

    batches: tuple[int, ...]
    prompt: int
    answer: int
    chunk: int
    eager: tuple[int, ...]


REAL = Load((1, 8, 32, 64, 128, 256), 1024, 128, 4096, (1, 32, 256))
TINY = Load((1, 3), 20, 4, 32, (1,))


@dataclass(slots=True)
class Result:
    """All numbers of one model; tok/s by the number of sequences."""

    model: str
    parameters: int
    weight_bytes: int = 0
    copy_gb_s: float = 0.0
    matmul_tflops: float = 0.0
    datasheet_gb_s: float | None = None
    prefill_tok_s: float = 0.0
    prefill_share: float = 0.0
    recorded: bool = False
    throughput: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    decode_eager: dict[int, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def share(self, gb_s: float | None) -> float | None:
        """Weights read per second by a lone sequence's decode, of a bandwidth."""
        if not gb_s or 1 not in self.decode:
            return None
        return self.weight_bytes * self.decode[1] / (gb_s * 1e9)


def datasheet(name: str) -> float | None:
    """The bandwidth of a device by its name, in GB/s; None for one that is not in the table."""
    words = name.replace("-", " ").split()
    return next((speed for device, speed in DATASHEET if all(word in words for word in device.split())), None)


def copy_bandwidth(machine: Machine) -> float:
    """Bytes read and written per second by a copy that no cache holds, in GB/s: the best of ten."""
    size = 1 << (22 if machine.smoke else 31)
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    source.zero_()
    best = min(machine.seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * size / best / 1e9


def matmul_rate(machine: Machine) -> float:
    """Operations per second of a large product of bfloat16, in TFLOP/s: the best of ten."""
    size = 128 if machine.smoke else 8192
    a, b = (torch.randn(size, size, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    best = min(machine.seconds(lambda: a @ b) for _ in range(10))
    return 2 * size**3 / best / 1e12


def measured(machine: Machine, until: float) -> Iterator[Result]:
    """The results of every model that fits, one after another. Nothing new begins after ``until`` (monotonic)."""
    bandwidth, rate = copy_bandwidth(machine), matmul_rate(machine)
    machine.forget()
    shapes = {"tiny": ("llama", SMOKE)} if machine.smoke else SHAPES
    load = TINY if machine.smoke else REAL
    for name, (family, config) in shapes.items():
        result = Result(name, 0, copy_gb_s=bandwidth, matmul_tflops=rate, datasheet_gb_s=datasheet(machine.name))
        try:
            _measure(machine, result, family, config, load, until)
        except torch.OutOfMemoryError as error:
            result.skipped.append(f"the rest does not fit into memory: {str(error).partition('.')[0]}")
        machine.forget()
        yield result


def _measure(machine: Machine, result: Result, family: str, config: dict[str, Any], load: Load, until: float) -> None:
    dtype = torch.float32 if machine.smoke else torch.bfloat16
    model = random_model(family, dtype, machine.device, False, **config)
    result.parameters = sum(parameter.numel() for parameter in model.module.parameters())
    result.weight_bytes = _weights_read(model) * dtype.itemsize
    settings: dict[str, Any] = {"max_running": max(load.batches)}
    if machine.smoke:
        settings["kv_memory"] = 4e6
    length = load.prompt + load.answer + 16
    runner = make_runner(machine, model, length, **settings)
    result.recorded = runner.replays
    if problem := uses(machine, runner):
        result.skipped.append(problem)
        return
    _measure_prefill(machine, runner, model, result, load)
    for batch in load.batches:
        if time.monotonic() > until:
            result.skipped.append(f"{batch} sequences: out of time")
        elif not Pages(runner).holds(batch, length):
            result.skipped.append(f"{batch} sequences: the cache holds {runner.info.num_blocks} blocks")
        else:
            result.throughput[batch], result.decode[batch] = _throughput(machine, runner, load, batch)
    del runner
    machine.forget()
    runner = make_runner(machine, model, length, cuda_graphs=False, **settings)
    for batch in load.eager:
        if time.monotonic() > until:
            result.skipped.append(f"{batch} sequences without recorded steps: out of time")
        elif Pages(runner).holds(batch, length):
            _, result.decode_eager[batch] = _throughput(machine, runner, load, batch, answer=min(32, load.answer))


def _weights_read(model: LoadedModel) -> int:
    """Parameters that a token needs: all but the input embedding, of which it reads a row if it is not the head too."""
    module = model.module
    total = sum(parameter.numel() for parameter in module.parameters())
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings()
    return total if head is not None and head.weight is embedding else total - embedding.numel()


def _measure_prefill(machine: Machine, runner: ModelRunner, model: LoadedModel, result: Result, load: Load) -> None:
    """Steps of nothing but prompts, each as large as the scheduler makes them."""
    prompts = max(1, load.chunk // load.prompt)
    pages = Pages(runner)
    if not pages.holds(prompts, load.prompt):
        result.skipped.append("prefill: the cache is too small")
        return
    sequences = [pages.sequence([3 + i % 200 for i in range(load.prompt)], load.prompt) for _ in range(prompts)]
    works = [Work(sequence, 0, load.prompt) for sequence in sequences]
    best = min(machine.seconds(lambda: runner.forward(works)) for _ in range(4))
    tokens = prompts * load.prompt
    embeddings = {id(layer.weight): layer.weight.numel() for layer in _ends(model)}
    operations = 2 * (result.parameters - sum(embeddings.values())) * tokens
    result.prefill_tok_s = tokens / best
    result.prefill_share = operations / best / (result.matmul_tflops * 1e12)


def _ends(model: LoadedModel) -> list[Any]:
    """The embedding and the head, which the tokens of a prompt do not pass, but for the last."""
    ends = [model.module.get_input_embeddings(), model.module.get_output_embeddings()]
    return [end for end in ends if end is not None]


def _throughput(
    machine: Machine, runner: ModelRunner, load: Load, batch: int, answer: int | None = None
) -> tuple[float, float]:
    """Answers to ``batch`` prompts that come at once: tokens of answers per second in all, and while decoding."""
    pages = Pages(runner)
    answer = answer or load.answer
    sequences = [pages.sequence(_prompt(number, load.prompt), load.prompt + answer + 1) for number in range(batch)]
    sampler = BatchSampler()

    def prefill() -> None:
        per_step = max(1, load.chunk // load.prompt)
        for begin in range(0, batch, per_step):
            _advance(runner, sampler, sequences[begin : begin + per_step], lambda _: 0)

    def decode() -> None:
        for _ in range(answer - 1):
            _advance(runner, sampler, sequences, lambda sequence: len(sequence.tokens) - 1)

    prefilling = machine.seconds(prefill)
    decoding = machine.seconds(decode)
    return batch * answer / (prefilling + decoding), batch * (answer - 1) / decoding


def _advance(
    runner: ModelRunner, sampler: BatchSampler, sequences: list[Sequence], start: Callable[[Sequence], int]
) -> None:
    """One step of the engine without its scheduler: forward, sample, append."""
    works = [Work(sequence, start(sequence), len(sequence.tokens) - start(sequence)) for sequence in sequences]
    sampled = sampler.sample(runner.forward(works), sequences, [None] * len(sequences))
    for sequence, token in zip(sequences, sampled, strict=True):
        sequence.tokens.append(token.token_id)


def _prompt(number: int, length: int) -> list[int]:
    return [3 + (i * 7 + number) % 200 for i in range(length)]
