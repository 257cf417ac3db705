"""Encoded rows on disk, for the next start: what reading and encoding the data files gave.

    <cache>/rows/<key>/train.*, held_out.*   the rows (``encoding.store``)
    <cache>/rows/<key>/account.json          what became of every input row, and the held-out conversations
    <cache>/rows/<key>/sha256.json           a digest of each of these files

The key covers everything they depend on: FORMAT, luthier's version, the files' content, the data settings, tokenizer,
template and stop tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier._util import files
from luthier.config import RunConfig
from luthier.data.report import DataReport
from luthier.data.source import expand
from luthier.encoding.encoder import Encoder
from luthier.encoding.rows import EncodedRows, RowsReport, read_into
from luthier.encoding.store import ExampleStore, NotKept, StoreWriter
from luthier.errors import UserError
from luthier.templates import digest
from luthier.types import Conversation, Message, RowRef, Say

FORMAT = 1  # to be raised when the same rows are encoded otherwise, or kept otherwise
_ACCOUNT, _DIGESTS = "account.json", "sha256.json"
_BYTES = 2 << 30  # of all entries together; the least recently used are deleted


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the cache, and the state that its source files were in when it was named."""

    path: Path
    sources: tuple[tuple[str, int, int], ...]


def root() -> Path:
    """Where all entries are."""
    return files.cache_root() / "rows"


def cached_rows(config: RunConfig, encoder: Encoder, say: Say) -> EncodedRows | None:
    """Open the rows of an earlier start, or read, encode and keep them. Raises NotKept if they cannot be kept.

    None if a data file cannot be opened: reading it will tell why.
    """
    at = entry(config, encoder)
    if at is None:
        return None
    if kept := load(at, say):
        return kept
    account = _write(at, config, encoder)
    if account.error:
        return EncodedRows(account)
    kept = load(at, say)
    if kept is None:
        raise NotKept(f"{at.path} cannot be read back")
    return kept


def entry(config: RunConfig, encoder: Encoder) -> Entry | None:
    """Where the rows of this run are kept; None if a file cannot be read."""
    try:
        paths = [p for pattern in (*config.data.train, *config.data.eval) for p in expand(pattern)]
        sources = _state(paths)
        facts = {
            "format": FORMAT,
            "versions": [__version__, version("tokenizers"), version("transformers")],
            "files": [[str(p), files.sha256(p)] for p in paths],
            "settings": config.data.model_dump(mode="json", exclude={"cache"}),
            "seed": config.train.seed,
            "tokenizer": encoder.tokenizer.digest(),
            "template": digest(encoder.template),
            "stop_ids": encoder.stop_ids,
        }
    except (OSError, UserError):
        return None
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Entry(root() / key[:20], sources)


def load(at: Entry, say: Say) -> EncodedRows | None:
    """The rows kept at an entry, read from the disk when asked for; None if there are none, or they are damaged."""
    folder = at.path
    if not folder.is_dir():
        return None
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name, recorded in digests.items():
            if files.sha256(folder / name) != recorded:
                raise ValueError(f"{name} is not as it was written")
        told = json.loads((folder / _ACCOUNT).read_text(encoding="utf-8"))
        train, held_out = (ExampleStore.map(folder, name, told["files"][name]) for name in ("train", "held_out"))
        account = _account(told)
        os.utime(folder)  # used now
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        say(f"note: {folder}: is damaged ({' '.join(str(e).split())[:160]}), so the rows are encoded again")
        return None
    return EncodedRows(account, train, held_out)


def _write(at: Entry, config: RunConfig, encoder: Encoder) -> RowsReport:
    """Read and encode all rows into the entry's directory, which appears only if they can be trained on."""
    stack = ExitStack()
    with _kept():
        folder = stack.enter_context(files.new_dir(at.path))
        train, held_out = StoreWriter(folder, "train"), StoreWriter(folder, "held_out")
    whole = False
    try:
        account = read_into(train, held_out, config.data, config.train.seed, encoder)
        if account.error:
            return account
        train.finish()
        held_out.finish()
        whole = True
    finally:  # also after NotKept and Ctrl-C
        if not whole:
            with suppress(NotKept):
                train.close()
                held_out.close()
            shutil.rmtree(folder, ignore_errors=True)
    with _kept(), stack:
        if _state([Path(p) for p, *_ in at.sources]) != at.sources:
            raise OSError("a data file was changed while it was read")
        told = _told(account) | {"files": {"train": train.files, "held_out": held_out.files}}
        (folder / _ACCOUNT).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
        digests = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    _trim(at.path)
    return account


@contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as e:
        raise NotKept(e.message if isinstance(e, UserError) else str(e)) from None


def _trim(latest: Path) -> None:
    """Delete the entries that were used longest ago, until the rest is small enough."""
    with suppress(OSError):  # another process does the same
        entries = [p for p in root().iterdir() if p.is_dir() and not p.name.startswith(".") and p != latest]
        total = 0
        for path in (latest, *sorted(entries, key=lambda p: -p.stat().st_mtime)):
            total += sum(f.stat().st_size for f in path.iterdir())
            if total > _BYTES and path != latest:
                shutil.rmtree(path, ignore_errors=True)


def _state(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


# --- the account as JSON --------------------------------------------------------------------------------------------


def _told(account: RowsReport) -> dict[str, Any]:
    return {
        "report": _report_told(account.report),
        "eval_report": _report_told(account.eval_report) if account.eval_report else None,
        "conversations": [_chat_told(c) for c in account.conversations],
        "samples": [_chat_told(c) for c in account.samples],
        "fingerprint": account.fingerprint,
    }


def _account(told: dict[str, Any]) -> RowsReport:
    return RowsReport(
        _report(told["report"]),
        _report(told["eval_report"]) if told["eval_report"] else None,
        tuple(_chat(c) for c in told["conversations"]),
        tuple(_chat(c) for c in told["samples"]),
        fingerprint=told["fingerprint"],
    )


def _report_told(report: DataReport) -> dict[str, Any]:
    problems = [[p.source.file, p.source.row, p.reason, p.outcome, p.fix] for p in report.problems]
    return {"read": report.read, "problems": problems, "notes": dict(report.notes), "formats": report.formats}


def _report(told: dict[str, Any]) -> DataReport:
    report = DataReport(told["read"], formats=told["formats"])
    report.notes.update(told["notes"])
    for file, row, reason, outcome, fix in told["problems"]:
        report.add(RowRef(file, row), reason, outcome, fix)
    return report


def _chat_told(chat: Conversation) -> list[Any]:
    return [chat.source.file, chat.source.row, [[m.role, m.content] for m in chat.messages]]


def _chat(told: list[Any]) -> Conversation:
    file, row, messages = told
    return Conversation(tuple(Message(role, content) for role, content in messages), RowRef(file, row))
