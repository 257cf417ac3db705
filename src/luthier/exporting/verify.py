"""What a tuned model is held against when it is handed over: base and adapter as training defined them, in fp32.

Everything is asked of the same fixed prompts, written by the run's own template under its own system prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters import directory as adapters
from luthier.adapters.directory import updates
from luthier.adapters.locate import TunedModel
from luthier.adapters.original_names import to_native
from luthier.lora.layers import LoraLinear, plain
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import read_config
from luthier.models.streamed import reader, streamed
from luthier.types import Message

PROMPTS = (
    "Who are you?",
    "你是谁？",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "请用一句话介绍你自己。",
    "How many days are there in 12 weeks, and why?",
    "def add(a, b):\n    return a + b\n\nExplain this.",
    "  Translate:  'good   morning'  ",
    "今天天气怎么样？",
    "What do you do when the fog comes in?",
    "List three colours: 1) red 2)",
    "It's 10:45 on 2024-03-01. What's next?",
    "Tell me a story\nin two lines.",
    "¿Dónde está la biblioteca? Größe, naïve, œuvre.",
    "小姐，别的秀女都在求中选。",
    "Thank you! 🙂 Goodbye.",
)


@dataclass(frozen=True, slots=True)
class Closeness:
    """How far another model's logits are from the tuned model's on ``prompts`` fixed prompts, in fp32.

    largest, mean: absolute differences; size: the tuned logits' own standard deviation.
    adapter:       what the adapter itself changes, on average. left: the share of it that rounding the sums leaves.
    carried:       how much of what is left the other model shows (1: all of it); None where other rounding hides it.
    """

    prompts: int
    tokens: int
    largest: float
    mean: float
    size: float
    adapter: float
    left: float
    carried: float | None

    def told(self) -> str:
        return (
            f"logits of base+adapter against the merged model on {self.prompts} prompts ({self.tokens} tokens, fp32): "
            f"maximum difference {self.largest:.2g}, mean {self.mean:.2g} (the adapter itself changes them by "
            f"{self.adapter:.2g} on average{self._lost()})"
        )

    def _lost(self) -> str:
        """What rounding swallowed of a change that is smaller than it."""
        return f", of which rounding leaves {self.left:.0%}" if self.left < 0.9 else ""


def chats(system: str | None) -> list[list[Message]]:
    """The fixed prompts as conversations."""
    opening = [Message("system", system)] if system else []
    return [[*opening, Message("user", text)] for text in PROMPTS]


def tuned_model(tuned: TunedModel, chat_format: ChatFormat) -> tuple[Any, dict[str, LoraLinear]]:
    """Base and adapter, the base from its original weights whatever it was trained on; and the adapter's layers."""
    model = streamed(chat_format.config, reader(tuned.base, chat_format.config))
    layers = adapters.apply(model, tuned.adapter, chat_format.modules())
    for name, update in to_native(updates(tuned.adapter), chat_format.modules()).items():
        layers[name].lora_A = torch.nn.Parameter(update.a.float(), requires_grad=False)
        layers[name].lora_B = torch.nn.Parameter(update.b.float(), requires_grad=False)
    return model, layers


@torch.no_grad()
def logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """[tokens, vocabulary] of the rows' ends, row after row: from ``_KEPT`` tokens before the shortest row's end on.

    Padding stands on the right, where causal attention never looks.
    """
    longest, start = max(map(len, rows)), max(0, min(map(len, rows)) - _KEPT)
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    kept = torch.arange(start, longest)
    found: Tensor = model(ids, use_cache=False, logits_to_keep=kept).logits
    found = found[:, start:] if found.shape[1] == longest else found  # a model without that option
    return torch.cat([one[: len(row) - start] for one, row in zip(found, rows, strict=True)])


@contextmanager
def summed(layers: Mapping[str, LoraLinear], kind: torch.dtype) -> Iterator[None]:
    """Within the block each update is added to its base's weight as that is fetched, the sum rounded to ``kind``."""

    def add(layer: LoraLinear) -> Callable[..., None]:
        def hook(base: nn.Module, _: Any) -> None:
            weight = base._parameters["weight"]
            assert weight is not None
            both = weight + layer.scaling * (layer.lora_B @ layer.lora_A)
            base._parameters["weight"] = nn.Parameter(both.to(kind).float(), requires_grad=False)

        return hook

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.base.register_forward_pre_hook(add(layer)).remove)
        stack.enter_context(plain(layers))
        yield


def compare_merged(tuned: TunedModel, chat_format: ChatFormat, merged: Path, kind: torch.dtype) -> Closeness:
    """The merged model, read from disk, against base and adapter, whose sums it stores in ``kind``.

    Raises ModelError where it cannot be read.
    """
    rows = [chat_format.prompt_ids(chat) for chat in chats(tuned.system)[:_FOR_LOGITS]]
    model, layers = tuned_model(tuned, chat_format)
    whole = logits(model, rows)
    with plain(layers):
        base = logits(model, rows)
    with summed(layers, kind):
        rounded = logits(model, rows)
    config = read_config(merged)
    return closeness(base, whole, rounded, logits(streamed(config, reader(merged, config)), rows), len(rows))


def closeness(base: Tensor, tuned: Tensor, rounded: Tensor, other: Tensor, prompts: int) -> Closeness:
    """All [tokens, vocabulary]. rounded: the tuned model's with its sums rounded as the other model stores them."""
    change, error = tuned - base, other - tuned
    effect = float(change.square().mean())
    return Closeness(
        prompts=prompts,
        tokens=len(tuned),
        largest=float(error.abs().max()),
        mean=float(error.abs().mean()),
        size=float(tuned.std()),
        adapter=float(change.abs().mean()),
        left=float((change * (rounded - base)).mean()) / effect if effect else 1.0,
        carried=_share(rounded - base, other - base),
    )


def _share(change: Tensor, shown: Tensor) -> float | None:
    """How much of ``change`` is in ``shown``; None where it drowns in what else is there."""
    effect, noise = float(change.square().mean()), float((shown - change).square().mean())
    return float((change * shown).mean()) / effect if effect > noise / 16 else None


_FOR_LOGITS, _KEPT = 4, 64  # whole logits are kept of so many prompts, not of all of a long system prompt
