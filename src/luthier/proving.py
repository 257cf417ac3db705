"""What a tuned model is held against when it is handed over: base and adapter as training defined them, in fp32.

Everything is asked of the same fixed prompts, written by the run's own template under its own system prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import adapter as adapters
from luthier.adapter import updates
from luthier.adapter_layout import to_native
from luthier.generate import prompt_text
from luthier.located import Located
from luthier.lora import LoraLinear, plain
from luthier.models.directory import read_config
from luthier.models.streamed import reader, streamed
from luthier.preflight import Voice
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
    adapter:       what the adapter itself changes, on average.
    carried:       how much of that change the other model shows (1: all of it); None where rounding hides it.
    """

    prompts: int
    tokens: int
    largest: float
    mean: float
    size: float
    adapter: float
    carried: float | None

    def told(self) -> str:
        return (
            f"logits of base+adapter against the merged model on {self.prompts} prompts ({self.tokens} tokens, fp32): "
            f"maximum difference {self.largest:.2g}, mean {self.mean:.2g} (the adapter itself changes them by "
            f"{self.adapter:.2g} on average{self._lost()})"
        )

    def _lost(self) -> str:
        """What rounding swallowed of a change that is smaller than it."""
        little = self.carried is not None and abs(self.carried - 1) > 0.1
        return f", of which rounding leaves {self.carried:.0%}" if little else ""


def chats(system: str | None) -> list[list[Message]]:
    """The fixed prompts as conversations."""
    opening = [Message("system", system)] if system else []
    return [[*opening, Message("user", text)] for text in PROMPTS]


def prompt_ids(voice: Voice, system: str | None) -> list[list[int]]:
    """The fixed prompts as the model reads them."""
    texts = [prompt_text(voice.template, chat) for chat in chats(system)]
    return [list(e.ids) for e in voice.tokenizer.encode_batch(texts)]


def tuned_model(found: Located, voice: Voice) -> tuple[Any, dict[str, LoraLinear]]:
    """Base and adapter, the base from its original weights whatever it was trained on; and the adapter's layers."""
    model = streamed(voice.config, reader(found.base, voice.config))
    layers = adapters.apply(model, found.adapter, voice.modules())
    for name, update in to_native(updates(found.adapter), voice.modules()).items():
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


def compare_merged(found: Located, voice: Voice, merged: Path) -> Closeness:
    """The merged model, read from disk, against base and adapter. Raises ModelError where it cannot be read."""
    rows = prompt_ids(voice, found.system)[:_FOR_LOGITS]
    model, layers = tuned_model(found, voice)
    tuned = logits(model, rows)
    with plain(layers):
        base = logits(model, rows)
    config = read_config(merged)
    return closeness(base, tuned, logits(streamed(config, reader(merged, config)), rows), len(rows))


def closeness(base: Tensor, tuned: Tensor, other: Tensor, prompts: int) -> Closeness:
    """All [tokens, vocabulary]."""
    change, error = tuned - base, other - tuned
    effect = float(change.square().mean())
    carried = float((change * (other - base)).mean()) / effect if effect > float(error.square().mean()) / 16 else None
    return Closeness(
        prompts=prompts,
        tokens=len(tuned),
        largest=float(error.abs().max()),
        mean=float(error.abs().mean()),
        size=float(tuned.std()),
        adapter=float(change.abs().mean()),
        carried=carried,
    )


_FOR_LOGITS, _KEPT = 4, 64  # whole logits are kept of so many prompts, not of all of a long system prompt
