"""Choose the dtype in which a model replies: the fastest one of the processor whose greedy replies are those of fp32.

On a CPU the compiled layers read every weight once per token, so bfloat16 takes about half the time of fp32. Whether a
model's replies remain the same is compared once, and the result is cached on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from luthier import __version__
from luthier._util import files
from luthier.adapters import directory as adapters
from luthier.adapters.locate import TunedModel
from luthier.compiled import Unsuitable
from luthier.config import ModelConfig
from luthier.devices.device import cpu_name, pick_dtype, trim_freed_memory
from luthier.errors import UserError
from luthier.evaluation.agreement import TOKENS, Agreement, agreement, chats
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.kernels.native import identity
from luthier.lora.layers import LoraLinear
from luthier.models.chat_format import ChatFormat
from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import weights_identity
from luthier.models.loader import open_base, quantisation
from luthier.models.native_model import in_fp32
from luthier.models.protocols import CausalLM
from luthier.models.quantization import Quantisation, QuantLinear, dense_product, quantise
from luthier.models.streamed import reader, streamed
from luthier.training.resources import calibrated, calls_per_second
from luthier.types import Log

NEAR = 0.03  # standard deviations of the logits: a near tie may be resolved differently in bfloat16
_FASTER = 1.3  # bfloat16 must be faster by this factor: for less, comparing the replies takes too long
_SMALL_BYTES = 100_000_000  # fp32 weights of this size are read from the processor's caches: bfloat16 saves little
_REPLIES = "greedy replies in bfloat16"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is opened for replies: a base model, and the adapter that ``attach`` adds to it, if any.

    adapter: identifies the adapter's values; empty for a base model.
    attach:  adds the adapter to a base model, and returns its layers by module name.
    """

    settings: ModelConfig
    chat_format: ChatFormat
    system: str | None = None
    adapter: str = ""
    attach: Callable[[CausalLM], dict[str, LoraLinear]] = lambda _: {}

    def open(self, dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, dict[str, LoraLinear]]:
        """Load the base model and attach the adapter. Raises ModelError or AdapterError."""
        model = open_base(self.settings, dtype, device, self.chat_format.config)
        return model, self.attach(model)


def tuned_subject(tuned: TunedModel, chat_format: ChatFormat, system: str | None = None) -> Subject:
    """Describe a base model with a finished adapter. system: None for that of the training."""
    return Subject(
        tuned.model_settings,
        chat_format,
        tuned.system if system is None else system,
        adapters.digest(tuned.adapter.path),
        lambda model: adapters.apply(model, tuned.adapter, chat_format.modules()),
    )


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype chosen for a model, and why."""

    dtype: str
    reason: str


def reply_dtype(
    name: str,
    device: torch.device,
    subjects: Sequence[Subject],
    fused: bool = True,
    log: Log = lambda _: None,
) -> torch.dtype:
    """Return the dtype in which models that share a base reply. Raises ConfigError for an unknown name.

    name:     "auto" or a dtype. On CUDA, "auto" is that of ``pick_dtype``. On a CPU it is bfloat16 if that is faster
              and the greedy replies of every one of ``subjects`` equal those of fp32 (near ties counted), else fp32.
    fused:    whether they are decoded with the compiled layers; transformers' layers round differently in a batch, so
              they compute in fp32.
    log:      gets a line if replies are compared.
    """
    if name != "auto" or device.type != "cpu":
        return pick_dtype(name, device)
    faster = fused and all(_choice(s, log).dtype == "bfloat16" for s in subjects)
    return torch.bfloat16 if faster else torch.float32


def _choice(subject: Subject, log: Log) -> DtypeChoice:
    """Return the recorded choice for a model, or make and record it."""
    if _fp32_bytes(subject) < _SMALL_BYTES:
        return DtypeChoice("float32", "the model is small")
    if not bfloat16_is_faster(quantisation(subject.settings)):
        return DtypeChoice("float32", "bfloat16 is not faster on this processor")
    file = _record(subject)
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(file.read_text(encoding="utf-8"))
        return DtypeChoice(stored["dtype"], stored["reason"])
    log("dtype: comparing the model's replies in bfloat16 with those in fp32, once for this model")
    try:
        choice, result = _compared(subject)
    except UserError as e:  # for example out of memory: compared again next time
        log(f"dtype: float32, because bfloat16 was not compared with it ({e.message})")
        return DtypeChoice("float32", e.message)
    log(f"dtype: {choice.dtype}, because {choice.reason}")
    with suppress(UserError):  # compared again next time
        files.write_json(file, {**asdict(choice), "agreement": asdict(result) if result else None})
    return choice


def _compared(subject: Subject) -> tuple[DtypeChoice, Agreement | None]:
    """Generate the fixed replies in bfloat16, and compare them with the model's most likely tokens in fp32.

    Raises UserError if that fails.
    """
    try:
        result = _replies_agree(subject)
    except Unsuitable as e:
        return DtypeChoice("float32", f"bfloat16 was not compared with it ({e})"), None
    finally:
        trim_freed_memory()
    if not result.near(NEAR):
        limit = f"(limit {NEAR * result.size:.2g})"
        return DtypeChoice("float32", f"{result.summary(_REPLIES, 'those in fp32')} {limit}"), result
    return DtypeChoice("bfloat16", result.summary(_REPLIES, "those in fp32")), result


def _replies_agree(subject: Subject) -> Agreement:
    """Compare replies in bfloat16 with fp32. Raises Unsuitable if the compiled layers cannot do that, or UserError."""
    chat_format = subject.chat_format
    model, _ = subject.open(torch.bfloat16, torch.device("cpu"))
    generator = Generator(model, chat_format)
    prompts = [chat_format.prompt_ids(chat) for chat in chats(subject.system)]
    fitting = [p for p in prompts if generator.room(len(p), TOKENS) >= 1]
    if not fitting:
        raise Unsuitable("its context is too short")
    replies = generator.reply_ids(fitting, Sampling(TOKENS))
    if quantisation(subject.settings):  # the reference computes with the same quantised weights
        with in_fp32(model):
            return agreement(model, fitting, replies)
    del model, generator
    reference = streamed(chat_format.config, reader(subject.settings.path, chat_format.config))
    subject.attach(reference)
    return agreement(reference, fitting, replies)


def _fp32_bytes(subject: Subject) -> int:
    """Return the size of the weights in fp32."""
    return 4 * sum(math.prod(shape) for shape in Shards.open(subject.settings.path).shapes.values())


def _record(subject: Subject) -> Path:
    """Return the file that records the choice for a model, named by everything that it depends on."""
    path, chat_format = subject.settings.path, subject.chat_format
    how = quantisation(subject.settings)
    facts = {
        "versions": [__version__, *(version(name) for name in ("torch", "transformers"))],
        "cpu": cpu_name(),
        "kernels": identity(),
        "weights": weights_identity(path, chat_format.config),
        "rotary": repr(getattr(chat_format.config, "rope_parameters", None)),
        "quantised": asdict(how) if how else None,
        "adapter": subject.adapter,
        "prompts": [chat_format.prompt_text(chat) for chat in chats(subject.system)],
        "limits": [NEAR, TOKENS],
    }
    return files.cache_root() / "dtypes" / f"{files.key_of(facts)}.json"


def bfloat16_is_faster(how: Quantisation | None) -> bool:
    """Whether this processor multiplies weights with a vector clearly faster in bfloat16 than in fp32.

    how: how the weights are stored; None: in the dtype itself. Measured once, then cached on disk.
    """
    kernels, name = identity(), how.kind if how else "dense"
    if kernels is None:
        return False

    def rate(dtype: torch.dtype) -> float:
        return calibrated(f"{dtype} {name} product {kernels}", lambda: _products_per_second(how, dtype))

    return rate(torch.bfloat16) > _FASTER * rate(torch.float32)


def _products_per_second(how: Quantisation | None, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure products of a weight that exceeds the caches with one vector; 0 without compiled kernels."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4096, generator=generator), torch.randn(8192, 4096, generator=generator)
    if how is None:
        multiply = dense_product(weight.to(dtype))
        return calls_per_second(lambda: multiply(x), seconds) if multiply else 0.0
    layer = QuantLinear(torch.nn.Linear(4096, 8192, bias=False, device="meta"), how, dtype)
    for part, value in quantise(weight, how).items():
        setattr(layer, part, value)
    with torch.no_grad():
        return calls_per_second(lambda: layer(x), seconds)
