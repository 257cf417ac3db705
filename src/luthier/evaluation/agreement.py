"""Compare greedy replies that were generated in another way with a model's own most likely tokens.

The other way may be another dtype or another program. All comparisons use the same fixed prompts, in the model's own
template and with its system prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.errors import ModelError
from luthier.models.protocols import CausalLM
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
TOKENS = 32  # of each reply


def chats(system: str | None) -> list[list[Message]]:
    """Return the fixed prompts as conversations."""
    opening = [Message("system", system)] if system else []
    return [[*opening, Message("user", text)] for text in PROMPTS]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of ``prompts`` replies (``tokens`` in total) equal a model's own greedy replies, token by token.

    furthest: largest difference between the logit of the model's most likely token and that of the reply's token.
    size:     standard deviation of the logits.
    """

    prompts: int
    same: int
    tokens: int
    furthest: float
    size: float

    def near(self, limit: float) -> bool:
        """Whether every other token is a near tie: at most ``limit`` standard deviations below the most likely one."""
        return self.furthest <= limit * self.size

    def summary(self, replies: str, reference: str) -> str:
        """Describe in one line how far ``replies`` agree with those of ``reference``."""
        ties = "" if self.same == self.prompts else f"; elsewhere at most {self.furthest:.2g} below the likeliest token"
        share = f"{self.same} of {self.prompts} prompts ({self.tokens} tokens)"
        return f"{replies} equal {reference} on {share}{ties}"


@torch.no_grad()
def agreement(model: CausalLM, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> Agreement:
    """Compare replies with the model's most likely tokens, in one pass over prompts and replies (token ids).

    Raises ModelError if a logit is not a number.
    """
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    decoder: Any = model.get_decoder()
    hidden = decoder(padded, use_cache=False).last_hidden_state
    head, same, furthest = model.get_output_embeddings(), 0, 0.0
    states = [h[len(p) - 1 : len(row) - 1] for h, p, row in zip(hidden, prompts, rows, strict=True)]
    logits = head(torch.cat(states)).split([len(s) for s in states])
    for values, reply in zip(logits, replies, strict=True):
        below = values.max(1).values - values.gather(1, torch.tensor(reply)[:, None])[:, 0]
        same += not bool(below.any())
        furthest = max(furthest, float(below.max()))
    size = float(torch.cat(logits).std())
    if not math.isfinite(size + furthest):
        raise ModelError("the model's output contains NaN", "use float32: --dtype float32")
    return Agreement(len(rows), same, sum(map(len, replies)), furthest, size)
