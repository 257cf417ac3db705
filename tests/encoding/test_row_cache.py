"""A run is the same with and without cached rows, and damaged or outdated entries are not used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import config as configs
from luthier.encoding import row_cache, store
from luthier.encoding import rows as rows_module
from luthier.encoding.rows import RowsReport
from luthier.encoding.store import ExampleStore, StoreWriter
from luthier.types import Conversation, Message, RowRef
from luthier.verbs.check import Inspection, inspect
from tests.conftest import Result
from tests.helpers.rows import encode, encoder

ROWS = [{"instruction": f"Question {i}?", "output": f"Answer {i} " * (1 + i % 7)} for i in range(40)]
ROWS[3]["output"] = ""  # dropped
ROWS[5]["output"] = "long " * 200  # truncated
ROWS[7]["outputs"] = "x"  # noted


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(row_cache, "root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def look(model_dir: Callable[[str], Path], rows: Path, messages: list[str]) -> Callable[..., Inspection]:
    def run(**data: Any) -> Inspection:
        values = {"train": rows, "max_length": 64, **data}
        return inspect(configs.build({"model": {"path": model_dir("llama")}, "data": values}), log=messages.append)

    return run


def facts(inspection: Inspection) -> dict[str, Any]:
    """Return everything that training and the reports use of an inspection."""
    return {
        "output": {k: v for k, v in inspection.as_dict().items() if k != "seconds"},
        "report": inspection.rows.report.data_report,
        "eval": inspection.rows.report.eval_report,
        "conversations": inspection.rows.report.conversations,
        "samples": inspection.rows.report.samples,
        "fingerprint": inspection.rows.report.fingerprint,
        "lengths": [s.lengths() for s in (inspection.rows.train, inspection.rows.held_out)],
        "supervised": [s.supervised() for s in (inspection.rows.train, inspection.rows.held_out)],
        "rows": [
            [(e.ids.tolist(), e.trained.tolist(), e.source, str(e.ids.dtype), str(e.trained.dtype)) for e in s]
            for s in (inspection.rows.train, inspection.rows.held_out)
        ],
    }


def entries(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.iterdir()) if cache_dir.exists() else []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One element for every time that the data files were read."""
    count: list[int] = []
    read = rows_module.read_into

    def counted(*args: Any) -> RowsReport:
        count.append(1)
        return read(*args)

    monkeypatch.setattr(rows_module, "read_into", counted)
    monkeypatch.setattr(row_cache, "read_into", counted)
    return count


@pytest.mark.parametrize("data", [{}, {"eval_fraction": 0.3}, {"eval": "ITSELF"}, {"control_tokens": "escape"}])
def test_cached_rows_equal_the_rows_that_are_read(
    data: dict[str, Any], look: Callable[..., Inspection], rows: Path, reads: list[int], messages: list[str]
) -> None:
    data = {k: str(rows) if v == "ITSELF" else v for k, v in data.items()}
    plain, first, second = look(cache=False, **data), look(**data), look(**data)
    assert plain.error is None
    assert len(reads) == 2
    assert facts(first) == facts(plain)
    assert facts(second) == facts(plain)
    assert second.rows.report.data_report.dropped == 1
    assert second.rows.report.data_report.changed > 1
    assert second.rows.report.data_report.notes
    assert isinstance(second.rows.train._columns.ends, np.memmap)
    assert not messages


def test_the_key_covers_everything_that_rows_depend_on(
    look: Callable[..., Inspection], rows: Path, reads: list[int], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look()
    assert len(entries(cache_dir)) == 1
    for data in ({"max_length": 48}, {"template": "jinja"}, {"system": "Be brief."}, {"train_on": "last_reply"}):
        look(**data)
    assert len(entries(cache_dir)) == len(reads) == 5
    before = rows.stat()
    rows.write_text(rows.read_text().replace("Question 1?", "Question x?"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and modification time as before
    assert look().rows.report.fingerprint != ""
    assert len(reads) == 6
    for number, (name, value) in enumerate((("FORMAT", row_cache.FORMAT + 1), ("__version__", "another")), 7):
        monkeypatch.setattr(row_cache, name, value)
        look()
        assert len(reads) == number
        look()
        assert len(reads) == number


def test_the_cache_can_be_switched_off(look: Callable[..., Inspection], reads: list[int], cache_dir: Path) -> None:
    look(cache=False)
    look(cache=False)
    assert len(reads) == 2
    assert not entries(cache_dir)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the ids": lambda at: flip(at / "train.ids"),
    "a bit of the rows report": lambda at: flip(at / "account.json"),
    "a bit of the digests": lambda at: flip(at / "sha256.json"),
    "a truncated file": lambda at: os.truncate(at / "train.trained", 10),
    "a missing file": lambda at: (at / "train.ends").unlink(),
    "no digests": lambda at: (at / "sha256.json").write_text("[]"),
    "an empty directory": lambda at: [f.unlink() for f in at.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rewritten_with_a_note(
    damage: str, look: Callable[..., Inspection], reads: list[int], cache_dir: Path, messages: list[str]
) -> None:
    expected = facts(look(cache=False))
    look()
    (entry,) = entries(cache_dir)
    DAMAGE[damage](entry)
    assert facts(look()) == expected
    assert f"note: {entry}: is damaged" in messages[0]
    assert messages[0].endswith("so the rows are encoded again")
    assert facts(look()) == expected
    assert len(messages) == 1
    assert len(reads) == 3


def test_a_full_disk_loses_the_cache_and_not_the_run(
    look: Callable[..., Inspection], cache_dir: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = facts(look(cache=False))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(store, "memoryview", full, raising=False)
        assert facts(look()) == expected
    assert messages == ["note: the encoded rows are not kept on disk ([Errno 28] No space left on device)"]
    assert not entries(cache_dir)
    cache_dir.rmdir()
    cache_dir.write_text("a file")
    assert facts(look()) == expected
    assert "cannot be used as a directory" in messages[1]


def test_rows_that_cannot_be_read_back_are_encoded_again_in_memory(
    look: Callable[..., Inspection], messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = facts(look(cache=False))
    monkeypatch.setattr(row_cache, "load", lambda *_: None)
    assert facts(look()) == expected
    assert len(messages) == 1 and messages[0].startswith("note: the encoded rows are not kept on disk (")
    assert messages[0].endswith("cannot be read back)")


def test_rows_of_a_file_that_changes_while_it_is_read_are_not_cached(
    look: Callable[..., Inspection], rows: Path, cache_dir: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = row_cache.read_into

    def read_and_change(*args: Any) -> RowsReport:
        report = read(*args)
        with rows.open("a") as f:
            f.write(json.dumps(ROWS[0]) + "\n")
        return report

    monkeypatch.setattr(row_cache, "read_into", read_and_change)
    look()
    assert "a data file was changed while it was read" in messages[0]
    assert not entries(cache_dir)


def test_refused_rows_are_not_cached(
    look: Callable[..., Inspection], rows: Path, cache_dir: Path, messages: list[str]
) -> None:
    rows.write_text(rows.read_text() + json.dumps({"instruction": "a", "output": "<|im_end|>"}) + "\n")
    expected, refused = look(cache=False), look()
    assert refused.error is not None
    assert expected.error is not None
    assert refused.error.message == expected.error.message
    assert refused.rows.report.data_report == expected.rows.report.data_report
    assert not entries(cache_dir)
    rows.unlink()
    missing = look()
    assert missing.error is not None
    assert "does not exist" in missing.error.message
    assert not messages


def test_the_least_recently_used_entry_is_deleted_first(
    look: Callable[..., Inspection], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = []
    for i, length in enumerate((40, 48, 56)):
        look(max_length=length)
        (new,) = set(entries(cache_dir)) - set(created)
        created.append(new)
        os.utime(new, (1000 + i, 1000 + i))
    look(max_length=40)  # used now
    size = max(sum(f.stat().st_size for f in entry.iterdir()) for entry in created)
    monkeypatch.setattr(row_cache, "_MAX_BYTES", int(2.5 * size))
    look(max_length=64)
    assert created[0] in entries(cache_dir)
    assert created[1] not in entries(cache_dir)
    assert len(entries(cache_dir)) == 2


def test_a_writer_buffers_few_tokens_and_writes_every_row(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_BUFFERED_TOKENS", 100)
    rows = [
        Conversation((Message("user", f"q {i}"), Message("assistant", "a " * (1 + i % 9))), RowRef(f"file {i % 3}", i))
        for i in range(50)
    ]
    examples = encode(encoder(tokenizer), rows)
    writer = StoreWriter(tmp_path, "train")
    for i, example in enumerate(examples, 1):
        writer.add(example)
        assert len(writer) == i
        assert writer._buffer.tokens < 100
    writer.finish()
    mapped, plain = ExampleStore.map(tmp_path, "train", writer.files), ExampleStore(examples)
    assert mapped.stats() == plain.stats()
    assert [e.source for e in mapped] == [e.source for e in plain]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(mapped, plain, strict=True))
    assert type(mapped[0].source.row) is int


def test_a_run_is_the_same_with_cached_rows(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], rows: Path, tmp_path: Path, cache_dir: Path
) -> None:
    def losses(run: Path, *more: str) -> list[float]:
        settings = [f"--set={s}" for s in ("train.max_steps=2", "train.eval_time_ratio=0", *more)]
        done = luthier("train", "--model", model_dir("llama"), "--data", rows, "--output-dir", run, *settings)
        assert done.code == 0, done.err
        return list(json.loads((run / "summary.json").read_text())["losses"])

    expected = losses(tmp_path / "plain", "data.cache=false")
    assert not entries(cache_dir)
    assert losses(tmp_path / "cold") == losses(tmp_path / "warm") == expected
    assert len(entries(cache_dir)) == 1
    shutil.rmtree(cache_dir)
