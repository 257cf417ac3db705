"""Score a model on held-out rows: loss, perplexity, share of replies that stop by themselves, and text metrics."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from luthier._util import files
from luthier.batching.collate import collate, to_device
from luthier.batching.plan import apart
from luthier.evaluation import text_metrics
from luthier.evaluation.text_metrics import TextMetrics, measure
from luthier.inference.generation import Generator, Reply
from luthier.inference.sampling import Sampling
from luthier.lora.layers import LoraLinear, disable_adapter, frozen_dtype
from luthier.models.directory import rotary_limit
from luthier.models.native_model import in_fp32
from luthier.models.protocols import CausalLM
from luthier.training.forward import LossFunction, LossOf, loss_sum, segment_attention
from luthier.types import Batch, Conversation, Example, Log, as_row

REPLIES, NEW_TOKENS = 24, 200  # held-out prompts that are answered, and the maximum length of a reply
SAMPLE_TOKENS = 128  # maximum length of a reply to a training prompt
HELD_OUT, RESULTS = "held-out.jsonl", "evaluation.json"  # files in a run directory
_ROWS, _TOKENS = 8, 2048  # per batch


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean negative log-likelihood per supervised token (nats), and the number of tokens and rows it covers."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on the held-out rows.

    text:     the replies compared with the reference replies of the rows.
    complete: false if the time limit was reached before all prompts were answered.
    seconds:  time taken by the replies.
    """

    held_out: HeldOut
    replies: tuple[Reply, ...]
    text: TextMetrics
    complete: bool
    seconds: float

    @property
    def stop_rate(self) -> float | None:
        """Share of the replies that ended with a stop token; None if there are no replies."""
        return sum(r.stopped for r in self.replies) / len(self.replies) if self.replies else None

    def as_dict(self) -> dict[str, object]:
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


@dataclass(frozen=True, slots=True)
class Losses:
    """The held-out losses of the base and the tuned model, on the same rows."""

    base: HeldOut
    tuned: HeldOut


@torch.no_grad()
def held_out_loss(model: CausalLM, examples: Sequence[Example], loss_of: LossOf | None = None) -> HeldOut:
    """Compute the mean loss per supervised token, rows in order. Leaves the model in eval mode.

    loss_of: computes the loss of a batch; None: with the model's own layers.
    """
    model.eval()
    total, tokens, rows = 0.0, 0, 0
    with ExitStack() as stack:
        if loss_of is None:
            stack.enter_context(segment_attention(model))
            loss_of = partial(loss_sum, model)
        for batch in _batches(examples, rotary_limit(model.config)):
            total += float(loss_of(to_device(batch, model.device)).double())
            tokens += batch.supervised
            rows += len(batch.sources)
    return HeldOut(total / tokens, tokens, rows)


def _batches(examples: Sequence[Example], rotary_limit: int | None) -> Iterator[Batch]:
    """Group rows in order: at most ``_ROWS`` and, unless one row is longer, ``_TOKENS`` tokens.

    rotary_limit: as for ``apart``.
    """
    rows: list[Example] = []
    for example in examples:
        if rows and (len(rows) == _ROWS or sum(map(len, rows)) + len(example) > _TOKENS):
            yield from map(collate, apart(rows, rotary_limit))
            rows = []
        rows.append(example)
    yield from map(collate, apart(rows, rotary_limit) if rows else ())


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """Return ``most`` rows, spread evenly over all of them; 0: all."""
    count = len(examples)
    chosen = min(most or count, count)
    return [examples[i * count // chosen] for i in range(chosen)]


def compare_losses(
    model: CausalLM, layers: Mapping[str, LoraLinear], examples: Sequence[Example], loss_of: LossFunction
) -> Losses:
    """Compute the held-out losses of both models.

    loss_of: the training's function, without dropout. It is used if it is compiled: the compiled layers round less than
    the model's own, and in bfloat16 agree with fp32 within 0.002. Otherwise the model's own layers compute in fp32.
    """
    with ExitStack() as stack:
        if not loss_of.compiled:
            stack.enter_context(in_fp32(model))
        chosen = loss_of if loss_of.compiled else None
        tuned = held_out_loss(model, examples, chosen)
        stack.enter_context(_without_updates(layers))
        return Losses(held_out_loss(model, examples, chosen), tuned)


@contextmanager
def _without_updates(layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Set every B to zero within the block: the base model, however its layers are computed."""
    before = [(layer.lora_B, layer.lora_B.detach().clone()) for layer in layers.values()]
    try:
        for b, _ in before:
            b.data.zero_()
        yield
    finally:
        for b, values in before:
            b.data.copy_(values)


def with_fitting_prompts(generator: Generator, chats: Sequence[Conversation], most: int) -> list[Conversation]:
    """Return the first ``most`` rows whose prompt fits into the model's context (training cuts longer rows)."""
    fitting = (c for c in chats if generator.fits(c.messages[:-1], c.tools))
    return list(itertools.islice(fitting, most))


def score(
    generator: Generator,
    loss: HeldOut,
    chats: Sequence[Conversation],
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
    seconds: float | None = None,
) -> Scores:
    """Score a model by its held-out loss and its greedy replies to the first ``most_replies`` prompts.

    seconds: time limit for the replies, None for none.
    """
    start = time.monotonic()
    deadline = None if seconds is None else start + seconds
    asked = with_fitting_prompts(generator, chats, most_replies)
    replies = answers(generator, asked, max_new_tokens, deadline)
    duration = time.monotonic() - start
    text = measure([r.text for r in replies], [c.messages[-1].content for c in asked[: len(replies)]])
    return Scores(loss, tuple(replies), text, len(replies) == len(asked), duration)


def answers(
    generator: Generator, chats: Sequence[Conversation], max_new_tokens: int, deadline: float | None = None
) -> list[Reply]:
    """Generate greedy replies in place of the last ones of conversations, in batches.

    deadline: in ``time.monotonic`` seconds; returns only the replies that were complete before it.
    """
    replies: list[Reply] = []
    size = _ROWS if deadline is not None else max(1, len(chats))
    for at in range(0, len(chats), size):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        some = chats[at : at + size]
        sampling = Sampling(max_new_tokens, max_seconds=left)
        batch = generator.replies([c.messages[:-1] for c in some], sampling, [c.tools for c in some])
        if deadline is not None and time.monotonic() > deadline:
            batch = batch if all(r.stopped for r in batch) else []  # cut off by the time limit
        replies += batch
    return replies


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of the base and the tuned model on the same rows. data: a file that holds these rows."""

    data: str
    base: Scores
    tuned: Scores
    dtype: str
    prompts: tuple[str, ...]
    references: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
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
    losses: Losses,
    chats: Sequence[Conversation],
    data: Path,
    seconds: float | None = None,
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
) -> Comparison:
    """Score the tuned model, then the base model (with the adapter switched off) on the same prompts.

    losses: of both models. data: the file that holds the rows. seconds: time limit for the replies; each model gets
    half of it.
    """
    half = None if seconds is None else seconds / 2
    asked = with_fitting_prompts(generator, chats, most_replies)
    after = score(generator, losses.tuned, asked, most_replies, max_new_tokens, half)
    scored = asked[: len(after.replies)]
    with disable_adapter(layers):
        before = score(generator, losses.base, scored, most_replies, max_new_tokens, half)
    return Comparison(
        data=str(data),
        base=before,
        tuned=after,
        dtype=str(frozen_dtype(generator.model)).removeprefix("torch."),
        prompts=tuple(c.messages[-2].content for c in scored),
        references=tuple(c.messages[-1].content for c in scored),
    )


def write_rows(path: Path, chats: Sequence[Conversation]) -> None:
    """Write held-out rows as chat messages (JSONL)."""
    files.write_text(path, "".join(json.dumps(as_row(c), ensure_ascii=False) + "\n" for c in chats))


def evaluate_run(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    losses: Losses,
    conversations: Sequence[Conversation],
    seconds: float,
    log: Log,
) -> Comparison:
    """Compare both models on a run's held-out rows, write ``evaluation.json`` and report the result.

    losses: of both models. seconds: time limit for the replies. log: called with the result and with notes.
    """
    result = compare(generator, layers, losses, conversations, run / HELD_OUT, seconds)
    files.write_json(run / RESULTS, result.as_dict())
    log(
        f"held-out loss: {losses.base.loss:.3f} before, {losses.tuned.loss:.3f} after "
        f"({losses.tuned.rows} of {len(conversations)} rows)"
    )
    if note := text_metrics.note():
        log(f"note: {note}")
    if not (result.tuned.complete and result.base.complete):
        log(
            f"sample replies stopped at their time limit ({seconds:.1f} s): {len(result.base.replies)} of "
            f"{min(REPLIES, len(conversations))} done; luthier eval {run} has no time limit"
        )
    return result


def write_sample_replies(
    run: Path,
    generator: Generator,
    layers: dict[str, LoraLinear],
    conversations: Sequence[Conversation],
    seconds: float,
    log: Log,
) -> None:
    """Write replies of both models to a few training prompts for the report, if there are no held-out rows.

    The tuned model may take half of the time, the base model, which seldom stops by itself, what is left.
    """
    deadline = time.monotonic() + seconds
    asked = with_fitting_prompts(generator, conversations, len(conversations))
    after = answers(generator, asked, SAMPLE_TOKENS, deadline - seconds / 2)
    with disable_adapter(layers):
        before = answers(generator, asked[: len(after)], SAMPLE_TOKENS, deadline)
    if len(before) < len(asked):
        log(f"replies for the report stopped at their time limit ({seconds:.1f} s): {len(before)} of {len(asked)} done")
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
