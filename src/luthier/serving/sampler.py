"""Choose the next token of one row, applying its settings as transformers' ``generate`` does."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.inference.generation import Sampling

if TYPE_CHECKING:
    from jaxtyping import Float


class Sampler:
    """Samples the tokens of one row with its own random generator, so that other rows of the batch do not affect it."""

    def __init__(self, s: Sampling, device: torch.device) -> None:
        self._device = device
        self._penalties = []
        if s.repetition_penalty != 1:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)))
        if s.no_repeat_ngram_size:
            self._penalties.append(NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
        self._warpers = []
        self._generator: torch.Generator | None = None
        if s.temperature > 0:
            self._generator = torch.Generator(device).manual_seed(s.seed % 2**63)
            self._warpers.append(TemperatureLogitsWarper(float(s.temperature)))
            if s.top_k:
                self._warpers.append(TopKLogitsWarper(s.top_k))
            if s.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(s.top_p)))

    @property
    def greedy(self) -> bool:
        """Whether the next token is always the most likely one, without penalties."""
        return self._generator is None and not self._penalties

    def next(self, logits: Float[Tensor, "1 vocab"], previous: Sequence[int]) -> int:
        """Choose the next token. logits [1, vocabulary] fp32; previous: ids of the prompt and the reply so far."""
        if self._penalties:
            ids = torch.tensor([list(previous)], device=self._device)
            for penalty in self._penalties:
                logits = penalty(ids, logits)
        if self._generator is None:
            return int(logits.argmax(-1))
        for warper in self._warpers:
            logits = warper(None, logits)
        return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=self._generator))


def random_seed() -> int:
    return secrets.randbelow(2**31)
