"""What becomes of each class of transformers that continues text: computed by C code or by torch, or refused and why.

Each class is built at a small size with lively random weights, loaded as the engine loads a model, and compared with a
plain forward of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.paged import MOE_TOLERANCE, TOLERANCE, PagedModel, plain_logits, texts
from support.scaled import scaled_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto

from engine.api.engine import EngineConfig, ModelInfo
from engine.api.errors import ModelRefused
from engine.cache.kv_tensors import KVCache
from engine.failures import NOT_FAILURES, sentence
from engine.model.loader import LoadedModel
from engine.native.build import native_runner
from engine.native.errors import NotNative
from engine.scheduling.contracts import Runner

SECONDS = 120
"""That a class may take."""

NAMES: dict[str, dict[str, str]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "multimodal": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
_AUTO = {
    "causal": AutoModelForCausalLM,
    "image-text": AutoModelForImageTextToText,
    "multimodal": AutoModelForMultimodalLM,
}
NATIVE, TORCH, REFUSED, WRONG = "native", "torch", "refused", "wrong"


@dataclass(frozen=True, slots=True)
class Fate:
    """``what`` is one of four words; ``why`` says why a class is refused, or what is wrong."""

    name: str
    what: str
    why: str


def class_names() -> dict[str, list[str]]:
    """All class names of the three mappings, each with the types of configuration that lead to it."""
    found: dict[str, list[str]] = {}
    for names in NAMES.values():
        for model_type, name in names.items():
            types = found.setdefault(name, [])
            if model_type not in types:
                types.append(model_type)
    return dict(sorted(found.items()))


def find_fates(names: Iterable[str]) -> Iterator[Fate]:
    """Each class in a process of its own: some hang, some crash."""
    context = multiprocessing.get_context("fork")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send_fate, args=(name, sender), daemon=True)
        child.start()
        sender.close()
        try:
            yield receiver.recv() if receiver.poll(SECONDS) else Fate(name, WRONG, f"takes more than {SECONDS} s")
        except EOFError:
            yield Fate(name, WRONG, "the process that computes it dies")
        finally:
            child.kill()
            child.join()


def _send_fate(name: str, sender: Any) -> None:
    try:
        sender.send(find_fate(name))
    except Exception as error:
        sender.send(Fate(name, WRONG, f"fails without a refusal: {sentence(error)}"))
        raise


def find_fate(name: str, published: dict[str, Any] | None = None) -> Fate:
    """Build, load and compare the class: with its defaults, or as ``published``, a checkpoint's configuration, says."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        try:
            model_class, config = small_class(name, published)
        except NOT_FAILURES:
            raise
        except BaseException as error:
            return Fate(name, REFUSED, f"its defaults describe no model: {_cleaned(str(error), place)}")
        try:
            save_lively(place, model_class, config)
        except NOT_FAILURES:
            raise
        except BaseException:
            # What cannot be built is refused by its configuration.
            config.architectures = [name]
            config.save_pretrained(place)
            save_file({"none": torch.zeros(1)}, place / "model.safetensors")
        try:
            paged = FastestModel(place)
        except ModelRefused as refusal:
            return Fate(name, REFUSED, _cleaned(str(refusal), place))
        worst, scale = compare(paged, plain_class(place, model_class))
        if worst > tolerance_of(paged.config):
            return Fate(name, WRONG, f"logits up to {scale:.1f} are {worst:.1e} apart")
        return Fate(name, NATIVE if paged.is_native else TORCH, "")


class FastestModel(PagedModel):
    """Computed natively where that can be."""

    is_native = False
    config: Any = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__(folder, block_size=16)

    def make_runner(self, loaded: LoadedModel, cache: KVCache, info: ModelInfo) -> Runner:
        self.config = loaded.module.config
        try:
            runner = native_runner(loaded, cache, info, EngineConfig(path=str(self._folder)), lambda stage, done: None)
        except NotNative:
            return super().make_runner(loaded, cache, info)
        self.is_native = True
        return runner


def class_and_config(name: str) -> tuple[Any, Any]:
    """The class of that name, and that of its configuration. Raises ``LookupError`` where transformers has none."""
    for kind, names in NAMES.items():
        mapping = _AUTO[kind]._model_mapping
        for model_type, found in names.items():
            if found == name and model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in mapping:
                model_class = mapping[CONFIG_MAPPING[model_type]]
                return model_class, model_class.config_class
    raise LookupError(f"no configuration of transformers leads to {name}")


def small_class(name: str, published: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The class of that name and a small configuration of it; ``published`` as for ``scaled_config``."""
    model_class, config_class = class_and_config(name)
    return model_class, scaled_config(config_class, published)


def lively_class_folder(path: Path, name: str, published: dict[str, Any] | None = None) -> Any:
    """Save a small model of the class; returns the class."""
    model_class, config = small_class(name, published)
    save_lively(path, model_class, config)
    return model_class


def plain_class(folder: Path, model_class: Any) -> Any:
    """The model as transformers runs it: eager attention, float32, no cache."""
    return model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def save_lively(path: Path, model_class: Any, config: Any) -> None:
    """Save a model with random weights that are large enough for all that attention does to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif parameter.numel() > 1 and (spread := float(parameter.std())) > 0:
                    parameter.mul_(0.12 / spread)
    model.save_pretrained(path)


def compare(paged: PagedModel, plain: Any) -> tuple[float, float]:
    """The largest difference of any logits, and the largest logit: side by side in chunks, alone, and after a prefix
    whose pages another sequence has filled."""
    compared = texts()
    prefix = 16 // paged.block_size * paged.block_size
    compared.append(compared[0][:prefix] + compared[2])
    expected = [plain_logits(plain, text) for text in compared]
    runs = [(range(3), paged.run(compared[:3], chunk)) for chunk in (2, 9, 64)]
    runs += [((number,), paged.run([compared[number]])) for number in range(3)]
    filled = paged.take_blocks(len(compared[0]))
    paged.run([compared[0]], blocks=[filled])
    tables = [filled[: prefix // paged.block_size] + paged.take_blocks(len(compared[n]) - prefix) for n in (0, 3)]
    runs.append(((0, 3), paged.run([compared[0], compared[3]], blocks=tables, cached=prefix)))
    apart = [
        float((row - expected[number][index]).abs().max())
        for numbers, found in runs
        for number, rows in zip(numbers, found, strict=True)
        for index, row in rows.items()
    ]
    assert apart, "nothing was compared"
    worst = float("inf") if any(map(math.isnan, apart)) else max(apart)
    return worst, max(float(logits.abs().max()) for logits in expected)


def tolerance_of(config: Any) -> float:
    """How far logits may be apart."""
    text = config.get_text_config().to_dict()
    return MOE_TOLERANCE if any("expert" in key and text[key] for key in text) else TOLERANCE


def _cleaned(message: str, folder: Path) -> str:
    """One line that is the same wherever it is written."""
    line = re.sub(r"\s+", " ", message.replace(str(folder), "the folder"))
    return re.sub(r"0x[0-9a-f]+", "0x…", line)
