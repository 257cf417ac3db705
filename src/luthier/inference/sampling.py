"""Settings of sampling, and the choice of the next token of one row, as transformers' ``generate`` makes it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.config import GenerationSettings
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

_NEUTRAL: dict[str, float] = {"top_p": 1.0, "top_k": 0}  # used only when sampling; these values have no effect


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. temperature 0: always the most likely token (reproducible).

    max_seconds: time limit; unfinished replies are cut off. Several replies share it.
    repetition_penalty, no_repeat_ngram_size: as in transformers, over the tokens of prompt and reply; 1 and 0: off.
    Raises ConfigError if a setting would be ignored.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_seconds: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        greedy = self.temperature == 0
        unused = [k for k, neutral in _NEUTRAL.items() if getattr(self, k) != neutral]
        if greedy and unused:
            raise ConfigError(
                f"{' and '.join(unused)} would be ignored: temperature 0 always picks the most likely token",
                f"set a temperature too (--temperature 0.7), or leave {' and '.join(unused)} out",
            )
        if not greedy and self.top_k == 1:
            raise ConfigError(
                "the temperature would be ignored: top_k 1 allows only the most likely token",
                "use temperature 0 (--temperature 0), which picks the most likely token, without top_k",
            )

    @classmethod
    def of(cls, chosen: GenerationSettings, seed: int = 0) -> Self:
        """Convert the generation settings of a run."""
        sampled = {k: getattr(chosen, k) for k in _NEUTRAL} if chosen.do_sample else {}
        return cls(
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature if chosen.do_sample else 0.0,
            seed=seed,
            repetition_penalty=chosen.repetition_penalty,
            no_repeat_ngram_size=chosen.no_repeat_ngram_size,
            **sampled,
        )

    def changed(self, **changes: float | None) -> Self:
        """Return a copy with these fields replaced; None keeps a field. Temperature 0 resets top_p and top_k.

        Raises ConfigError if a setting would be ignored.
        """
        values = asdict(self)
        if changes.get("temperature") == 0:
            values.update(_NEUTRAL)
        values.update({k: v for k, v in changes.items() if v is not None})
        return type(self)(**values)


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
