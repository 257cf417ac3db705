"""Base and tuned model side by side on held-out rows: the verb ``eval``, and what a run does at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import files, text_metrics
from luthier.chatting import Chat
from luthier.config import RunConfig, build
from luthier.data.text import encoding_of
from luthier.errors import ConfigError
from luthier.evaluate import NEW_TOKENS, REPLIES, Scores, answers, askable, score
from luthier.generate import Generator
from luthier.lora import LoraLinear, frozen_dtype, plain
from luthier.preflight import Inspection, read_held_out
from luthier.types import Conversation, Example

HELD_OUT, RESULTS = "held-out.jsonl", "evaluation.json"


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


def evaluate(
    chat: Chat,
    run: Path | None,
    data: Sequence[Path],
    most_replies: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
) -> Comparison:
    """The verb: ``data``'s rows, or the run's own held-out ones. Raises UserError where there are none."""
    rows = list(data)
    own = run / HELD_OUT if run else None
    if not rows and own is not None and own.is_file():
        rows = [own]
    if not rows:
        raise ConfigError(
            "there are no held-out rows",
            "give --data FILE, or train with --set data.eval=FILE or --set data.eval_fraction=0.05",
        )
    found = read_held_out(chat.voice, chat.config or _defaults(rows), rows)
    file = rows[0]
    if len(rows) > 1 or not _as_they_are(file, found):
        file = (run or Path()) / "eval-rows.jsonl"  # one file in a format that everything reads
        write_rows(file, found.chats)
    return compare(chat.generator, chat.layers, found.held_out, found.chats, file, None, most_replies, max_new_tokens)


def _as_they_are(file: Path, found: Inspection) -> bool:
    """Whether a file holds the rows that were scored, as plain JSON or JSONL in a format that everything reads."""
    plain = file.suffix.lower() in (".json", ".jsonl") and file.is_file() and encoding_of(file) == "utf-8"
    whole = not found.report.dropped and not found.config.data.rename
    return plain and whole and set(found.report.formats.values()) <= {"alpaca", "messages"}


def at_the_end(
    run: Path,
    found: Inspection,
    generator: Generator,
    layers: dict[str, LoraLinear],
    seconds: float,
    say: Callable[[str], None],
) -> Comparison:
    """What a run does with its held-out rows: compare within ``seconds``, and keep figures and samples."""
    result = compare(generator, layers, found.held_out, found.chats, run / HELD_OUT, seconds)
    files.write_json(run / RESULTS, result.as_dict())
    say(
        f"held-out loss: {result.base.held_out.loss:.3f} before, {result.tuned.held_out.loss:.3f} after "
        f"({result.tuned.held_out.rows} of {len(found.held_out)} rows)"
    )
    if note := text_metrics.note():
        say(f"note: {note}")
    if not (result.tuned.complete and result.base.complete):
        say(f"evaluation stopped after its time ({seconds:.1f} s); luthier eval {run} takes as long as it needs")
    return result


def samples_at_the_end(
    run: Path,
    found: Inspection,
    generator: Generator,
    layers: dict[str, LoraLinear],
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Without held-out rows: replies of both models to a few training questions, for the report."""
    asked = askable(generator, found.samples, len(found.samples))
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


def _defaults(rows: Sequence[Path]) -> RunConfig:
    return build({"model": {"path": "."}, "data": {"train": list(rows)}})
