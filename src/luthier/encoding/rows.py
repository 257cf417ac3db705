"""Data files -> encoded rows, with held-out rows set apart and what became of every input row.

files -> Loader -> Conversation -> Encoder -> Example -> train
                                              `--------> held_out   (data.eval_fraction, or data.eval's own files)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier.config import DataConfig
from luthier.data.loader import Loader, refuse
from luthier.data.report import DataReport
from luthier.encoding.encoder import Encoder
from luthier.encoding.store import ExampleStore, StoreWriter
from luthier.errors import ConfigError, UserError
from luthier.types import Conversation, Example

Sink = ExampleStore | StoreWriter
SAMPLES = 4  # training questions that a run without held-out rows is asked at its end


@dataclass(frozen=True, slots=True)
class RowsReport:
    """What became of every input row, besides the ids.

    eval_report:   the account of ``data.eval``'s files, if there are any.
    conversations: the held-out ones. samples: the first few training ones. first: the first few encoded rows.
    fingerprint:   SHA-256 over every conversation that was read.
    error:         why the rows cannot be trained on; the counts are complete either way.
    """

    report: DataReport
    eval_report: DataReport | None = None
    conversations: tuple[Conversation, ...] = ()
    samples: tuple[Conversation, ...] = ()
    first: tuple[Example, ...] = ()
    fingerprint: str = ""
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """The encoded rows of a run, and the account of how they were read."""

    account: RowsReport
    train: ExampleStore = field(default_factory=ExampleStore)
    held_out: ExampleStore = field(default_factory=ExampleStore)


def count_rows(config: DataConfig) -> EncodedRows:
    """Read every row without encoding it, for a complete report when the model cannot be used."""
    loader = _loader(config)
    error = None
    try:
        for _ in loader:
            pass
    except UserError as e:
        error = e
    return EncodedRows(RowsReport(loader.report, error=error))


def encode_rows(config: DataConfig, seed: int, encoder: Encoder, keep: bool = True, show: int = 0) -> EncodedRows:
    """Read and encode every row into memory. keep: false keeps only lengths. show: see ``read_into``."""
    train, held_out = ExampleStore(keep=keep), ExampleStore(keep=keep)
    return EncodedRows(read_into(train, held_out, config, seed, encoder, show), train, held_out)


def read_into(
    train: Sink, held_out: Sink, config: DataConfig, seed: int, encoder: Encoder, show: int = 0
) -> RowsReport:
    """Read every row once, from file to ids, and add it to one of the two. show: how many rows to keep in ``first``.

    A user's mistake is in ``error``. Raises NotKept if a sink on disk cannot be written.
    """
    loader = _loader(config)
    conversations: list[Conversation] = []
    samples: list[Conversation] = []
    first: list[Example] = []
    trained: set[bytes] = set()
    eval_report, fingerprint, error = None, "", None
    try:
        if config.eval and config.eval_fraction:
            raise ConfigError(
                "data.eval_fraction would be ignored: data.eval names the held-out rows", "leave one of the two out"
            )
        for conversation, example in encoder.stream(loader, loader.report):
            if len(first) < show:
                first.append(example)
            if config.eval_fraction and is_held_out(conversation, config.eval_fraction, seed):
                held_out.add(example)
                conversations.append(conversation)
                continue
            train.add(example)
            if config.eval:
                trained.add(prompt_key(conversation))
            if len(samples) < SAMPLES:
                samples.append(conversation)
        fingerprint = loader.fingerprint()
        _check_split(config, loader, train, held_out)
        if config.eval:
            evaluated = read_held_out(config.eval, config, encoder, held_out)
            eval_report, conversations = evaluated.report, list(evaluated.conversations)
            fingerprint += evaluated.fingerprint
            if evaluated.error:
                raise evaluated.error
            if leaks := sum(prompt_key(c) in trained for c in conversations):
                loader.report.notes["the prompt of a row in data.eval is trained too"] = leaks
    except UserError as e:
        error = e
    return RowsReport(
        loader.report, eval_report, tuple(conversations), tuple(samples), tuple(first), fingerprint, error
    )


def read_held_out(paths: Sequence[Path], config: DataConfig, encoder: Encoder, held_out: Sink) -> RowsReport:
    """Read rows that are only evaluated, encoded as the run's own. A user's mistake is in ``error``."""
    loader = Loader(paths, config.format, config.system, config.rename)
    conversations: list[Conversation] = []
    error = None
    try:
        for conversation, example in encoder.stream(loader, loader.report):
            held_out.add(example)
            conversations.append(conversation)
        refuse(loader.report)
    except UserError as e:
        error = e
    return RowsReport(loader.report, None, tuple(conversations), fingerprint=loader.fingerprint(), error=error)


def is_held_out(conversation: Conversation, fraction: float, seed: int) -> bool:
    """Whether a row is for evaluation: by a hash of its prompt, so that equal prompts are on one side, always.

    A conversation's prompt is what comes before its first reply: one that goes on where another ends is on its side.
    """
    return int.from_bytes(prompt_key(conversation, seed), "little") < fraction * 2**64


def prompt_key(conversation: Conversation, seed: int = 0) -> bytes:
    """A hash of 8 bytes over what comes before the first reply."""
    key = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    for m in itertools.takewhile(lambda m: m.role != "assistant", conversation.messages):
        key.update(f"{m.role}\0{m.content.strip()}\0".encode())
    return key.digest()


def _loader(config: DataConfig) -> Loader:
    return Loader(config.train, config.format, config.system, config.rename, config.dedupe)


def _check_split(config: DataConfig, loader: Loader, train: Sink, held_out: Sink) -> None:
    """Raise UserError unless there are rows to train on, and every ``data.rename`` was used."""
    if loader.unused and loader.report.read:
        names = ", ".join(map(repr, sorted(loader.unused)))
        raise ConfigError(
            f"data.rename would be ignored: no row has the key {names}", "correct --rename OLD=NEW, or leave it out"
        )
    refuse(loader.report)
    if not len(train):  # refuse() has seen to the case of no rows at all
        raise ConfigError(
            f"data.eval_fraction {config.eval_fraction}: holds out every row", "choose a smaller fraction"
        )
    if config.eval_fraction and not len(held_out):
        loader.report.notes[f"data.eval_fraction {config.eval_fraction} held out no row of {len(train)}"] += 1
