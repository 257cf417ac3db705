"""Figures on held-out rows: loss, perplexity, how many replies end by themselves, and how close they come."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier._util import files
from luthier.batching.collate import collate, to_device
from luthier.evaluation import text_metrics
from luthier.evaluation.text_metrics import TextMetrics, measure
from luthier.inference.generation import Generator, Reply, Sampling
from luthier.lora.layers import LoraLinear, frozen_dtype, plain
from luthier.training.forward import segment_attention, token_losses
from luthier.types import Conversation, Example, Message, Say

REPLIES, NEW_TOKENS = 24, 200  # replies to how many held-out prompts, and how long they may get
HELD_OUT, RESULTS = "held-out.jsonl", "evaluation.json"  # files of a run
_ROWS = 8


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean negative log-likelihood of a supervised token (nats), over how many tokens and rows."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, slots=True)
class Scores:
    """One model on the held-out rows. ``complete`` is false where the time given ran out.

    text: the replies against the rows' own.
    """

    held_out: HeldOut
    replies: tuple[Reply, ...]
    text: TextMetrics
    complete: bool
    seconds: float

    @property
    def stop_rate(self) -> float | None:
        """Share of the replies that ended by a stop token; None where there was no time for any."""
        return sum(r.stopped for r in self.replies) / len(self.replies) if self.replies else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "loss": self.held_out.loss,
            "perplexity": self.held_out.perplexity,
            "tokens": self.held_out.tokens,
            "rows": self.held_out.rows,
            "stop_rate": self.stop_rate,
            **self.text.as_dict(),
            "replies": len(self.replies),
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
        }


def held_out_loss(model: Any, examples: Sequence[Example], deadline: float | None = None) -> HeldOut:
    """Loss over every supervised token, rows in their order; leaves the model in eval mode.

    deadline: on ``time.monotonic``'s clock; after it no further batch is begun (one always is).
    """
    model.eval()
    total, tokens, rows = 0.0, 0, 0
    with segment_attention(model):
        for at in range(0, len(examples), _ROWS):
            if rows and deadline is not None and time.monotonic() > deadline:
                break
            batch = collate(examples[at : at + _ROWS])
            total += float(token_losses(model, to_device(batch, model.device)).double().sum())
            tokens += batch.supervised
            rows += len(batch.sources)
    return HeldOut(total / tokens, tokens, rows)


def askable(generator: Generator, chats: Sequence[Conversation], most: int) -> list[Conversation]:
    """The first ``most`` rows whose prompt the model can read whole (in training longer rows are cut)."""
    fitting = (c for c in chats if generator.fits(c.messages[:-1]))
    return list(itertools.islice(fitting, most))


def score(
    generator: Generator,
    examples: Sequence[Example],
    chats: Sequence[Conversation],
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
    seconds: float | None = None,
) -> Scores:
    """Loss on all rows, then greedy replies to the first ``most_replies`` prompts, within ``seconds`` if given."""
    start = time.monotonic()
    deadline = None if seconds is None else start + seconds
    loss = held_out_loss(generator.model, examples, deadline)
    asked = askable(generator, chats, most_replies)
    replies = answers(generator, [c.messages[:-1] for c in asked], max_new_tokens, deadline)
    complete = loss.rows == len(examples) and len(replies) == len(asked)
    took = time.monotonic() - start
    text = measure([r.text for r in replies], [c.messages[-1].content for c in asked[: len(replies)]])
    return Scores(loss, tuple(replies), text, complete, took)


def answers(
    generator: Generator, prompts: Sequence[Sequence[Message]], max_new_tokens: int, deadline: float | None = None
) -> list[Reply]:
    """Greedy replies, in batches; with a deadline (``time.monotonic``) those that were whole before it."""
    replies: list[Reply] = []
    size = _ROWS if deadline is not None else max(1, len(prompts))
    for at in range(0, len(prompts), size):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        batch = generator.replies(prompts[at : at + size], Sampling(max_new_tokens, max_seconds=left))
        if deadline is not None and time.monotonic() > deadline:
            batch = batch if all(r.stopped for r in batch) else []  # cut by the clock, not by the model
        replies += batch
    return replies


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both models on the same rows; ``data`` is a file that holds them."""

    data: str
    base: Scores
    tuned: Scores
    dtype: str
    prompts: tuple[str, ...]
    references: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        samples = zip(self.prompts, self.references, self.base.replies, self.tuned.replies, strict=False)
        return {
            "data": self.data,
            "dtype": self.dtype,
            "base": self.base.as_dict(),
            "tuned": self.tuned.as_dict(),
            "samples": [
                {"prompt": p, "reference": r, "base": b.text, "tuned": t.text, "stopped": t.stopped}
                for p, r, b, t in samples
            ],
        }


def compare(
    generator: Generator,
    layers: dict[str, LoraLinear],
    examples: Sequence[Example],
    chats: Sequence[Conversation],
    data: Path,
    seconds: float | None = None,
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
) -> Comparison:
    """Score the tuned model, then the base (the adapter switched off) on what was scored; half of the time each."""
    half = None if seconds is None else seconds / 2
    asked = askable(generator, chats, most_replies)
    after = score(generator, examples, asked, most_replies, max_new_tokens, half)
    scored = asked[: len(after.replies)]
    with plain(layers):
        before = score(generator, examples[: after.held_out.rows], scored, most_replies, max_new_tokens, half)
    return Comparison(
        data=str(data),
        base=before,
        tuned=after,
        dtype=str(frozen_dtype(generator.model)).removeprefix("torch."),
        prompts=tuple(c.messages[-2].content for c in scored),
        references=tuple(c.messages[-1].content for c in scored),
    )


def write_rows(path: Path, chats: Sequence[Conversation]) -> None:
    """Held-out rows as chat messages, one a line."""
    rows = ({"messages": [{"role": m.role, "content": m.content} for m in c.messages]} for c in chats)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def at_the_end(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    seconds: float,
    say: Say,
) -> Comparison:
    """What a run does with its held-out rows: compare within ``seconds``, and keep figures and samples."""
    result = compare(generator, layers, examples, conversations, run / HELD_OUT, seconds)
    files.write_json(run / RESULTS, result.as_dict())
    say(
        f"held-out loss: {result.base.held_out.loss:.3f} before, {result.tuned.held_out.loss:.3f} after "
        f"({result.tuned.held_out.rows} of {len(examples)} rows)"
    )
    if note := text_metrics.note():
        say(f"note: {note}")
    if not (result.tuned.complete and result.base.complete):
        say(f"evaluation stopped after its time ({seconds:.1f} s); luthier eval {run} takes as long as it needs")
    return result


def samples_at_the_end(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    conversations: Sequence[Conversation],
    seconds: float,
    say: Say,
) -> None:
    """Without held-out rows: replies of both models to a few training questions, for the report."""
    asked = askable(generator, conversations, len(conversations))
    prompts = [c.messages[:-1] for c in asked]
    after = answers(generator, prompts, NEW_TOKENS, time.monotonic() + seconds / 2)
    with plain(layers):
        before = answers(generator, prompts[: len(after)], NEW_TOKENS, time.monotonic() + seconds / 2)
    if len(before) < len(asked):
        say(f"replies for the report stopped after their time ({seconds:.1f} s), {len(before)} of {len(asked)} written")
    rows = zip(asked, before, after, strict=False)
    samples = [
        {
            "prompt": c.messages[-2].content,
            "reference": c.messages[-1].content,
            "base": b.text,
            "tuned": t.text,
            "stopped": t.stopped,
        }
        for c, b, t in rows
    ]
    files.write_json(run / RESULTS, {"data": None, "samples": samples})
