"""Cache encoded rows on disk, so that the next start does not read and encode the data files again.

    <cache>/rows/<key>/train.*, held_out.*   the rows (``encoding.store``)
    <cache>/rows/<key>/account.json          the outcome of every input row, and the held-out conversations
    <cache>/rows/<key>/sha256.json           a digest of each of these files

The key covers everything that the rows depend on: FORMAT, luthier's version, the content of the data files, the data
settings, tokenizer, template, stop tokens and the size of the embedding table.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from luthier import __version__
from luthier._util import files
from luthier.config import RunConfig
from luthier.data.loader import DataReport, Outcome
from luthier.data.source import expand
from luthier.encoding.encoder import Encoder
from luthier.encoding.rows import EncodedRows, RowsReport, read_into
from luthier.encoding.store import CacheWriteError, ExampleStore, StoreWriter
from luthier.errors import UserError
from luthier.templates import digest
from luthier.types import Conversation, Log, Message, RowRef, ToolCall

FORMAT = 3  # increase it if the same rows are encoded or stored differently
_REPORT, _DIGESTS = "account.json", "sha256.json"
_MAX_BYTES = 2 << 30  # of all entries together; the least recently used ones are deleted


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A directory of the cache. sources: path, bytes and modification time (ns) of the data files when it was named."""

    path: Path
    sources: tuple[tuple[str, int, int], ...]


def root() -> Path:
    """Return the directory of all entries."""
    return files.cache_root() / "rows"


def cached_rows(config: RunConfig, encoder: Encoder, log: Log) -> EncodedRows | None:
    """Open the rows that an earlier start cached, or read, encode and cache them.

    Returns None if a data file cannot be opened; reading it then reports the reason. Raises CacheWriteError if the rows
    cannot be cached.
    """
    cache_entry = entry(config, encoder)
    if cache_entry is None:
        return None
    if rows := load(cache_entry, log):
        return rows
    report = _write(cache_entry, config, encoder)
    if report.error:
        return EncodedRows(report)
    rows = load(cache_entry, log)
    if rows is None:
        raise CacheWriteError(f"{cache_entry.path} cannot be read back")
    return rows


def entry(config: RunConfig, encoder: Encoder) -> CacheEntry | None:
    """Return the cache entry for the rows of this run, or None if a data file cannot be read."""
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
            "table": encoder.table,
        }
    except (OSError, UserError):
        return None
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return CacheEntry(root() / key[:20], sources)


def load(cache_entry: CacheEntry, log: Log) -> EncodedRows | None:
    """Open the rows of an entry, which are read from the disk when accessed. None if it is missing or damaged."""
    folder = cache_entry.path
    if not files.exists(folder):
        return None
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name, recorded in digests.items():
            if files.sha256(folder / name) != recorded:
                raise ValueError(f"{name} has changed since it was written")
        record: _RowsReportRecord = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        train, held_out = (ExampleStore.map(folder, name, record["files"][name]) for name in ("train", "held_out"))
        report = _rows_report_of(record)
        with suppress(OSError):  # the cache may be read-only
            os.utime(folder)  # marks the entry as just used
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        log(f"note: {folder}: is damaged ({' '.join(str(e).split())[:160]}), so the rows are encoded again")
        return None
    return EncodedRows(report, train, held_out)


def _write(cache_entry: CacheEntry, config: RunConfig, encoder: Encoder) -> RowsReport:
    """Read and encode all rows into the entry's directory, which is created only if they can be trained on."""
    stack = ExitStack()
    with _raising_not_kept():
        folder = stack.enter_context(files.new_dir(cache_entry.path))
        train, held_out = StoreWriter(folder, "train"), StoreWriter(folder, "held_out")
    complete = False
    try:
        report = read_into(train, held_out, config.data, config.train.seed, encoder)
        if report.error:
            return report
        train.finish()
        held_out.finish()
        complete = True
    finally:  # also after CacheWriteError and Ctrl-C
        if not complete:
            with suppress(CacheWriteError):
                train.close()
                held_out.close()
            shutil.rmtree(folder, ignore_errors=True)
    with _raising_not_kept(), stack:
        if _state([Path(p) for p, *_ in cache_entry.sources]) != cache_entry.sources:
            raise OSError("a data file was changed while it was read")
        record = _rows_report_record(report, {"train": train.files, "held_out": held_out.files})
        (folder / _REPORT).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        digests = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    _trim(cache_entry.path)
    return report


@contextmanager
def _raising_not_kept() -> Iterator[None]:
    """Turn errors of the file system into CacheWriteError."""
    try:
        yield
    except (OSError, UserError) as e:
        raise CacheWriteError(e.message if isinstance(e, UserError) else str(e)) from None


def _trim(latest: Path) -> None:
    """Delete the least recently used entries, except ``latest``, until the others are small enough."""
    with suppress(OSError):  # another process may be deleting them too
        entries = [p for p in root().iterdir() if p.is_dir() and not p.name.startswith(".") and p != latest]
        total = 0
        for path in (latest, *sorted(entries, key=lambda p: -p.stat().st_mtime)):
            total += sum(f.stat().st_size for f in path.iterdir())
            if total > _MAX_BYTES and path != latest:
                shutil.rmtree(path, ignore_errors=True)


def _state(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return (path, bytes, modification time in ns) of every file."""
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


# --- the rows report as JSON ----------------------------------------------------------------------------------------


# tuples are lists once they have been read back from JSON
_Problem = tuple[str, int, str, Outcome, str]


class _DataReportRecord(TypedDict):
    read: int
    problems: list[_Problem]
    notes: dict[str, int]
    formats: dict[str, str]


class _ChatRecord(TypedDict):
    source: tuple[str, int]
    messages: list[dict[str, object]]  # the fields of a Message
    tools: list[dict[str, object]]


class _RowsReportRecord(TypedDict):
    report: _DataReportRecord
    eval_report: _DataReportRecord | None
    conversations: list[_ChatRecord]
    samples: list[_ChatRecord]
    fingerprint: str
    files: dict[str, list[str]]


def _rows_report_record(report: RowsReport, data_files: dict[str, list[str]]) -> _RowsReportRecord:
    return {
        "report": _data_report_record(report.data_report),
        "eval_report": _data_report_record(report.eval_report) if report.eval_report else None,
        "conversations": [_chat_record(c) for c in report.conversations],
        "samples": [_chat_record(c) for c in report.samples],
        "fingerprint": report.fingerprint,
        "files": data_files,
    }


def _rows_report_of(record: _RowsReportRecord) -> RowsReport:
    return RowsReport(
        _data_report_of(record["report"]),
        _data_report_of(record["eval_report"]) if record["eval_report"] else None,
        tuple(_chat_of(c) for c in record["conversations"]),
        tuple(_chat_of(c) for c in record["samples"]),
        fingerprint=record["fingerprint"],
    )


def _data_report_record(report: DataReport) -> _DataReportRecord:
    problems: list[_Problem] = [(p.source.file, p.source.row, p.reason, p.outcome, p.fix) for p in report.problems]
    return {"read": report.read, "problems": problems, "notes": dict(report.notes), "formats": report.formats}


def _data_report_of(record: _DataReportRecord) -> DataReport:
    report = DataReport(record["read"], formats=record["formats"])
    report.notes.update(record["notes"])
    for file, row, reason, outcome, fix in record["problems"]:
        report.add(RowRef(file, row), reason, outcome, fix)
    return report


def _chat_record(chat: Conversation) -> _ChatRecord:
    return {
        "source": (chat.source.file, chat.source.row),
        "messages": [asdict(m) for m in chat.messages],
        "tools": [dict(tool) for tool in chat.tools],
    }


def _chat_of(record: _ChatRecord) -> Conversation:
    messages = []
    for fields in record["messages"]:
        calls = fields.pop("tool_calls")
        assert isinstance(calls, list)
        create: Callable[..., Message] = Message
        messages.append(create(**fields, tool_calls=tuple(ToolCall(**call) for call in calls)))
    return Conversation(tuple(messages), RowRef(*record["source"]), tuple(record["tools"]))
