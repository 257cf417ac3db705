"""Helpers of the law tests: rows, encodings, models with a random non-zero adapter, plain padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.config import LoraConfig
from luthier.data.loader import DataReport, Loader
from luthier.encoding.encoder import Encoder
from luthier.lora.layers import LoraLinear, attach, resolve
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import ChatML
from luthier.types import Conversation, Example, Message, RowRef

REPLIES = (
    "Gannet Rock here. The lamp is lit.",
    "No.",
    "There are one hundred and twelve stairs, and I have counted every one of them twice a day for forty years.",
    "茶还热着，客官请坐。",
    "Bosun sleeps.",
    "The tide turns at six, so I shall tie the boat before supper and write it in the logbook afterwards.",
    "Aye, ask away.",
)


def conversations(count: int = 7) -> list[Conversation]:
    """Make rows of unequal lengths, some with several turns."""
    rows = []
    for i in range(count):
        messages = [Message("user", f"Question {i}?"), Message("assistant", REPLIES[i % len(REPLIES)])]
        if i % 3 == 1:
            messages += [Message("user", "And then?"), Message("assistant", REPLIES[(i + 2) % len(REPLIES)])]
        if i % 3 == 2:
            messages.insert(0, Message("system", "You keep a lighthouse."))
        rows.append(Conversation(tuple(messages), RowRef("rows", i + 1)))
    return rows


def encoder(tokenizer: Tokenizer, **kwargs: Any) -> Encoder:
    return Encoder(**{"template": ChatML(), "tokenizer": tokenizer, "stop_ids": (2,), "max_length": 512, **kwargs})


def last_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation in which only the last reply is trained."""
    return (*(replace(m, trained=m.role != "assistant") for m in messages[:-1]), messages[-1])


def encode(encoder: Encoder, conversations: Iterable[Conversation], report: DataReport | None = None) -> list[Example]:
    return [e for _, examples in encoder.stream(conversations, report or DataReport()) for e in examples]


def examples(tokenizer: Tokenizer, count: int = 7) -> list[Example]:
    return encode(encoder(tokenizer), conversations(count))


@dataclass(frozen=True)
class Loaded:
    """The content of data files, and the report of reading them."""

    conversations: list[Conversation]
    report: DataReport


def load(*paths: Path, **options: Any) -> Loaded:
    loader = Loader(paths, **options)
    return Loaded(list(loader), loader.report)


def with_adapter(model: Any, seed: int = 1, **lora: Any) -> dict[str, LoraLinear]:
    """Attach a random *non-zero* adapter to every linear layer (with B zero most faults would go unnoticed)."""
    layers = attach(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}), resolve(model, None), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return layers


def gradients(layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter name and clear them."""
    gradients = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            parameter = getattr(layer, part)
            gradients[f"{name}.{part}"] = parameter.grad.clone()
            parameter.grad = None
    return gradients


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, divided by the norm of ``b``."""
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    return max(distance(a[name], b[name]) for name in a)


def padded(rows: Sequence[Example], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and labels as in other trainers: [rows, longest] each."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = 1
        labels[i, : len(row)] = np.where(row.trained, row.ids, -100)
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def padded_losses(model: Any, rows: Sequence[Example]) -> torch.Tensor:
    """Compute the loss of every supervised token, in row order, with a padded forward pass of transformers' model."""
    ids, mask, labels = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="none")
    return losses[labels[:, 1:].reshape(-1) != -100]


def fails(law: Callable[[], None]) -> bool:
    """Whether a law's test fails."""
    try:
        law()
    except AssertionError:
        return True
    return False
