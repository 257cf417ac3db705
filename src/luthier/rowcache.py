"""Encoded rows on disk, for the next start: what reading and encoding the data files gave.

    <cache>/rows/<key>/train.*, held_out.*   the rows (``luthier.store``)
    <cache>/rows/<key>/account.json          what became of every input row, and the held-out conversations
    <cache>/rows/<key>/sha256.json           a digest of each of these files

The key covers everything they depend on: the files' content, the data settings, tokenizer, template and stop tokens,
and the code that reads and encodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier import files
from luthier.config import RunConfig
from luthier.data import DataReport
from luthier.data.source import expand
from luthier.errors import UserError
from luthier.store import ExampleStore, NotKept, StoreWriter
from luthier.types import Conversation, Message, RowRef

Say = Callable[[str], None]
_ACCOUNT, _DIGESTS = "account.json", "sha256.json"
_BYTES = 2 << 30  # of all entries together; the least recently used are deleted
_CODE = (
    "config.py",
    "control.py",
    "data",
    "encode.py",
    "models",
    "preflight.py",
    "rowcache.py",
    "store.py",
    "templates",
)


@dataclass(slots=True)
class Account:
    """What reading the rows told, besides their ids. The fields are ``preflight.Inspection``'s."""

    report: DataReport = field(default_factory=DataReport)
    eval_report: DataReport | None = None
    chats: list[Conversation] = field(default_factory=list)
    samples: list[Conversation] = field(default_factory=list)
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the cache, and the state that its source files were in when it was named."""

    path: Path
    sources: tuple[tuple[str, int, int], ...]


def root() -> Path:
    """Where all entries are."""
    return files.cache_root() / "rows"


def entry(config: RunConfig, **voice: Any) -> Entry | None:
    """Where the rows of this run are kept; None where a file cannot be read, which reading it will explain.

    voice: what encoding takes from the model: its tokenizer, template and stop tokens, as plain values.
    """
    try:
        paths = [p for pattern in (*config.data.train, *config.data.eval) for p in expand(pattern)]
        sources = _state(paths)
        facts = {
            "code": _code(),
            "versions": [version("tokenizers"), version("transformers")],
            "files": [[str(p), files.sha256(p)] for p in paths],
            "settings": config.data.model_dump(mode="json", exclude={"cache"}),
            "seed": config.train.seed,
            **voice,
        }
    except (OSError, UserError):
        return None
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Entry(root() / key[:20], sources)


def load(at: Entry, say: Say) -> tuple[Account, ExampleStore, ExampleStore] | None:
    """(account, training rows, held-out rows), the rows on disk; None where there are none, or not whole."""
    folder = at.path
    if not folder.is_dir():
        return None
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if files.sha256(folder / name) != digest:
                raise ValueError(f"{name} is not as it was written")
        told = json.loads((folder / _ACCOUNT).read_text(encoding="utf-8"))
        stores = [ExampleStore.map(folder, name, told["files"][name]) for name in ("train", "held_out")]
        account = _account(told)
        os.utime(folder)  # used now
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        say(f"note: {folder}: is damaged ({' '.join(str(e).split())[:160]}), so the rows are encoded again")
        return None
    return account, stores[0], stores[1]


@contextmanager
def writing(at: Entry) -> Iterator[tuple[StoreWriter, StoreWriter, Account]]:
    """(training rows, held-out rows, account) to be filled; kept when the block ends well. Raises NotKept."""
    stack = ExitStack()
    with _kept():
        folder = stack.enter_context(files.new_dir(at.path))
        train, held_out = StoreWriter(folder, "train"), StoreWriter(folder, "held_out")
    account = Account()
    try:
        yield train, held_out, account
        train.finish()
        held_out.finish()
    except BaseException:  # the reader's own errors are not this folder's
        with suppress(NotKept):
            train.close()
            held_out.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with _kept(), stack:
        if _state([Path(p) for p, *_ in at.sources]) != at.sources:
            raise OSError("a data file was changed while it was read")
        told = _told(account) | {"files": {"train": train.files, "held_out": held_out.files}}
        (folder / _ACCOUNT).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
        digests = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    _trim(at.path)


@contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as e:
        raise NotKept(e.message if isinstance(e, UserError) else str(e)) from None


def _trim(latest: Path) -> None:
    """Delete the entries that were used longest ago, until the rest is small enough."""
    with suppress(OSError):  # another process does the same
        found = [p for p in root().iterdir() if p.is_dir() and not p.name.startswith(".") and p != latest]
        total = 0
        for path in (latest, *sorted(found, key=lambda p: -p.stat().st_mtime)):
            total += sum(f.stat().st_size for f in path.iterdir())
            if total > _BYTES and path != latest:
                shutil.rmtree(path, ignore_errors=True)


def _state(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


@cache
def _code() -> str:
    """SHA-256 of the source that decides how rows are read and encoded."""
    found = hashlib.sha256()
    here = Path(__file__).parent
    for path in (here / name for name in _CODE):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()


# --- the account as JSON --------------------------------------------------------------------------------------------


def _told(account: Account) -> dict[str, Any]:
    return {
        "report": _report_told(account.report),
        "eval_report": _report_told(account.eval_report) if account.eval_report else None,
        "chats": [_chat_told(c) for c in account.chats],
        "samples": [_chat_told(c) for c in account.samples],
        "fingerprint": account.fingerprint,
    }


def _account(told: dict[str, Any]) -> Account:
    return Account(
        _report(told["report"]),
        _report(told["eval_report"]) if told["eval_report"] else None,
        [_chat(c) for c in told["chats"]],
        [_chat(c) for c in told["samples"]],
        told["fingerprint"],
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
