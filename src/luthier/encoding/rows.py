"""Read data files into encoded rows, separate the held-out ones, and record the outcome of every input row.

files -> Loader -> Conversation -> Encoder -> Example -> train
                                              `--------> held_out   (data.eval_fraction, or data.eval's own files)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier.config import DataConfig
from luthier.data.loader import DataReport, Loader, refuse
from luthier.encoding.encoder import Encoder
from luthier.encoding.store import ExampleStore, StoreWriter
from luthier.errors import ConfigError, UserError
from luthier.types import Conversation, Example

Sink = ExampleStore | StoreWriter
SAMPLES = 4  # training prompts that are answered after a run without held-out rows


@dataclass(frozen=True, slots=True)
class RowsReport:
    """The outcome of every input row, besides the token ids.

    data_report:   the report on the files of ``data.train``.
    eval_report:   the report on the files of ``data.eval``, if there are any.
    conversations: the held-out ones. samples: the first few training ones. first: the first few encoded rows.
    fingerprint:   hex SHA-256 over every conversation that was read.
    error:         why the rows cannot be trained on; the counts are complete in either case.
    """

    data_report: DataReport
    eval_report: DataReport | None = None
    conversations: tuple[Conversation, ...] = ()
    samples: tuple[Conversation, ...] = ()
    first: tuple[Example, ...] = ()
    fingerprint: str = ""
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The encoded rows of a run, and the report on how they were read."""

    report: RowsReport
    train: ExampleStore = field(default_factory=ExampleStore)
    held_out: ExampleStore = field(default_factory=ExampleStore)


def count_rows(config: DataConfig) -> EncodedRows:
    """Read every row without encoding it, for a complete report if the model cannot be used."""
    loader = _loader(config.train, config, config.dedupe)
    error = None
    try:
        for _ in loader:
            pass
    except UserError as e:
        error = e
    return EncodedRows(RowsReport(loader.report, error=error))


def encode_rows(config: DataConfig, seed: int, encoder: Encoder, keep: bool = True, show: int = 0) -> EncodedRows:
    """Read and encode every row into memory. keep: if false, store only lengths. show: see ``read_into``."""
    train, held_out = ExampleStore(keep=keep), ExampleStore(keep=keep)
    return EncodedRows(read_into(train, held_out, config, seed, encoder, show), train, held_out)


def read_into(
    train: Sink, held_out: Sink, config: DataConfig, seed: int, encoder: Encoder, show: int = 0
) -> RowsReport:
    """Read and encode every row once, and add it to ``train`` or ``held_out``.

    show: number of rows to store in ``first``. A user's mistake is returned in ``error``.
    Raises CacheWriteError if a sink on disk cannot be written.
    """
    loader = _loader(config.train, config, config.dedupe)
    conversations: list[Conversation] = []
    samples: list[Conversation] = []
    first: list[Example] = []
    trained: set[bytes] = set()
    eval_report, fingerprint, error = None, "", None
    try:
        for conversation, examples in encoder.stream(loader, loader.report):
            if len(first) < show:
                first += examples[: show - len(first)]
            if config.eval_fraction and is_held_out(conversation, config.eval_fraction, seed):
                add_all(held_out, examples)
                conversations.append(conversation)
                continue
            add_all(train, examples)
            if config.eval:
                trained.add(prompt_key(conversation))
            if len(samples) < SAMPLES:
                samples.append(conversation)
        fingerprint = loader.fingerprint()
        _check_split(config, loader, train, held_out)
        if config.eval:
            evaluated = read_held_out(config.eval, config, encoder, held_out)
            eval_report, conversations = evaluated.data_report, list(evaluated.conversations)
            fingerprint += evaluated.fingerprint
            if evaluated.error:
                raise evaluated.error
            if leaks := sum(prompt_key(c) in trained for c in conversations):
                loader.report.notes["the prompt of a row in data.eval is also trained on"] = leaks
    except UserError as e:
        error = e
    return RowsReport(
        loader.report, eval_report, tuple(conversations), tuple(samples), tuple(first), fingerprint, error
    )


def read_held_out(paths: Sequence[Path], config: DataConfig, encoder: Encoder, held_out: Sink) -> RowsReport:
    """Read rows that are only evaluated, encoded like the run's own. A user's mistake is returned in ``error``."""
    loader = _loader(paths, config)
    conversations: list[Conversation] = []
    error = None
    try:
        for conversation, examples in encoder.stream(loader, loader.report):
            add_all(held_out, examples)
            conversations.append(conversation)
        refuse(loader.report, config.max_unrendered)
    except UserError as e:
        error = e
    return RowsReport(loader.report, None, tuple(conversations), fingerprint=loader.fingerprint(), error=error)


def add_all(sink: Sink, examples: Sequence[Example]) -> None:
    """Add the examples of one row."""
    for example in examples:
        sink.add(example)


def is_held_out(conversation: Conversation, fraction: float, seed: int) -> bool:
    """Whether a row is held out for evaluation, decided by a hash of its prompt.

    The prompt is everything before the first reply to a user. Equal prompts are therefore always on the same side, and
    so is a conversation that continues another one.
    """
    return int.from_bytes(prompt_key(conversation, seed), "little") < fraction * 2**64


def prompt_key(conversation: Conversation, seed: int = 0) -> bytes:
    """Return an 8-byte hash of everything before the first reply to a user."""
    key = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    first = next((i for i, m in enumerate(conversation.messages) if m.role == "user"), 0)
    answers = (i for i, m in enumerate(conversation.messages) if m.role == "assistant" and i > first)
    for m in conversation.messages[: next(answers, None)]:
        key.update(f"{m.role}\0{m.content.strip()}\0".encode())
    return key.digest()


def _loader(paths: Sequence[Path], config: DataConfig, dedupe: bool = False) -> Loader:
    return Loader(paths, config.format, config.system, config.rename, dedupe)


def _check_split(config: DataConfig, loader: Loader, train: Sink, held_out: Sink) -> None:
    """Raise UserError unless there are rows to train on, and every ``data.rename`` was used."""
    if loader.unused and loader.report.read:
        names = ", ".join(map(repr, sorted(loader.unused)))
        raise ConfigError(
            f"data.rename would be ignored: no row has the key {names}", "correct --rename OLD=NEW, or leave it out"
        )
    refuse(loader.report, config.max_unrendered)
    if not len(train):  # refuse() has handled the case of no rows at all
        raise ConfigError(
            f"data.eval_fraction {config.eval_fraction}: holds out every row", "choose a smaller fraction"
        )
    if config.eval_fraction and not len(held_out):
        loader.report.notes[f"data.eval_fraction {config.eval_fraction} held out no row of {len(train)}"] += 1
