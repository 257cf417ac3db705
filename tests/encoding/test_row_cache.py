"""Encoded rows on disk: the same run with and without, and every way in which an entry can be wrong."""

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
ROWS[5]["output"] = "long " * 200  # cut
ROWS[7]["outputs"] = "x"  # noted


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(row_cache, "root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def look(model_dir: Callable[[str], Path], rows: Path, said: list[str]) -> Callable[..., Inspection]:
    def run(**data: Any) -> Inspection:
        values = {"train": rows, "max_length": 64, **data}
        return inspect(configs.build({"model": {"path": model_dir("llama")}, "data": values}), say=said.append)

    return run


def facts(found: Inspection) -> dict[str, Any]:
    """Everything that training and the reports take from an inspection."""
    return {
        "told": {k: v for k, v in found.as_dict().items() if k != "seconds"},
        "report": found.rows.account.report,
        "eval": found.rows.account.eval_report,
        "conversations": found.rows.account.conversations,
        "samples": found.rows.account.samples,
        "fingerprint": found.rows.account.fingerprint,
        "lengths": [s.lengths() for s in (found.rows.train, found.rows.held_out)],
        "supervised": [s.supervised() for s in (found.rows.train, found.rows.held_out)],
        "rows": [
            [(e.ids.tolist(), e.trained.tolist(), e.source, str(e.ids.dtype), str(e.trained.dtype)) for e in s]
            for s in (found.rows.train, found.rows.held_out)
        ],
    }


def entries(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.exists() else []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often the files were read."""
    count: list[int] = []
    read = rows_module.read_into

    def counted(*args: Any) -> RowsReport:
        count.append(1)
        return read(*args)

    monkeypatch.setattr(rows_module, "read_into", counted)
    monkeypatch.setattr(row_cache, "read_into", counted)
    return count


@pytest.mark.parametrize("data", [{}, {"eval_fraction": 0.3}, {"eval": "ITSELF"}, {"control_tokens": "escape"}])
def test_kept_rows_are_the_rows(
    data: dict[str, Any], look: Callable[..., Inspection], rows: Path, reads: list[int], said: list[str]
) -> None:
    data = {k: str(rows) if v == "ITSELF" else v for k, v in data.items()}
    plain, first, second = look(cache=False, **data), look(**data), look(**data)
    assert plain.error is None
    assert len(reads) == 2
    assert facts(first) == facts(plain)
    assert facts(second) == facts(plain)
    assert second.rows.account.report.dropped == 1
    assert second.rows.account.report.changed > 1
    assert second.rows.account.report.notes
    assert isinstance(second.rows.train._columns.ends, np.memmap)
    assert not said


def test_what_rows_depend_on_is_in_the_key(
    look: Callable[..., Inspection], rows: Path, reads: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look()
    assert len(entries(place)) == 1
    for data in ({"max_length": 48}, {"template": "jinja"}, {"system": "Be brief."}, {"train_on": "last_reply"}):
        look(**data)
    assert len(entries(place)) == len(reads) == 5
    before = rows.stat()
    rows.write_text(rows.read_text().replace("Question 1?", "Question x?"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))  # as long, and as old, as before
    assert look().rows.account.fingerprint != ""
    assert len(reads) == 6
    for number, (name, value) in enumerate((("FORMAT", row_cache.FORMAT + 1), ("__version__", "another")), 7):
        monkeypatch.setattr(row_cache, name, value)
        look()
        assert len(reads) == number
        look()
        assert len(reads) == number


def test_the_choice_to_keep_none(look: Callable[..., Inspection], reads: list[int], place: Path) -> None:
    look(cache=False)
    look(cache=False)
    assert len(reads) == 2
    assert not entries(place)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the ids": lambda at: flip(at / "train.ids"),
    "a bit of the account": lambda at: flip(at / "account.json"),
    "a bit of the digests": lambda at: flip(at / "sha256.json"),
    "cut short": lambda at: os.truncate(at / "train.trained", 10),
    "a file lost": lambda at: (at / "train.ends").unlink(),
    "no digests": lambda at: (at / "sha256.json").write_text("[]"),
    "nothing in it": lambda at: [f.unlink() for f in at.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again_and_said(
    damage: str, look: Callable[..., Inspection], reads: list[int], place: Path, said: list[str]
) -> None:
    expected = facts(look(cache=False))
    look()
    (entry,) = entries(place)
    DAMAGE[damage](entry)
    assert facts(look()) == expected
    assert f"note: {entry}: is damaged" in said[0]
    assert said[0].endswith("so the rows are encoded again")
    assert facts(look()) == expected
    assert len(said) == 1
    assert len(reads) == 3


def test_a_disk_without_room_costs_the_copy_and_not_the_run(
    look: Callable[..., Inspection], place: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = facts(look(cache=False))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(store, "memoryview", full, raising=False)
        assert facts(look()) == expected
    assert said == ["note: the encoded rows are not kept on disk ([Errno 28] No space left on device)"]
    assert not entries(place)
    place.rmdir()
    place.write_text("a file")
    assert facts(look()) == expected
    assert "cannot be used as a directory" in said[1]


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    look: Callable[..., Inspection], rows: Path, place: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = row_cache.read_into

    def meddled(*args: Any) -> RowsReport:
        account = read(*args)
        with rows.open("a") as f:
            f.write(json.dumps(ROWS[0]) + "\n")
        return account

    monkeypatch.setattr(row_cache, "read_into", meddled)
    look()
    assert "a data file was changed while it was read" in said[0]
    assert not entries(place)


def test_rows_that_are_refused_are_not_kept(
    look: Callable[..., Inspection], rows: Path, place: Path, said: list[str]
) -> None:
    rows.write_text(rows.read_text() + json.dumps({"instruction": "a", "output": "<|im_end|>"}) + "\n")
    expected, found = look(cache=False), look()
    assert found.error is not None
    assert expected.error is not None
    assert found.error.message == expected.error.message
    assert found.rows.account.report == expected.rows.account.report
    assert not entries(place)
    rows.unlink()
    gone = look()
    assert gone.error is not None
    assert "does not exist" in gone.error.message
    assert not said


def test_what_was_used_longest_ago_goes_first(
    look: Callable[..., Inspection], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for i, length in enumerate((40, 48, 56)):
        look(max_length=length)
        (new,) = set(entries(place)) - set(made)
        made.append(new)
        os.utime(new, (1000 + i, 1000 + i))
    look(max_length=40)  # used now
    size = max(sum(f.stat().st_size for f in m.iterdir()) for m in made)
    monkeypatch.setattr(row_cache, "_BYTES", int(2.5 * size))
    look(max_length=64)
    assert made[0] in entries(place)
    assert made[1] not in entries(place)
    assert len(entries(place)) == 2


def test_a_writer_holds_little_and_loses_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_TOKENS", 100)
    rows = [
        Conversation((Message("user", f"q {i}"), Message("assistant", "a " * (1 + i % 9))), RowRef(f"file {i % 3}", i))
        for i in range(50)
    ]
    examples = encode(encoder(tokenizer), rows)
    writer = StoreWriter(tmp_path, "train")
    for i, example in enumerate(examples, 1):
        writer.add(example)
        assert len(writer) == i
        assert writer._held.tokens < 100
    writer.finish()
    mapped, plain = ExampleStore.map(tmp_path, "train", writer.files), ExampleStore(examples)
    assert mapped.stats() == plain.stats()
    assert [e.source for e in mapped] == [e.source for e in plain]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(mapped, plain, strict=True))
    assert type(mapped[0].source.row) is int


def test_a_run_is_the_same_from_kept_rows(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], rows: Path, tmp_path: Path, place: Path
) -> None:
    def losses(run: Path, *more: str) -> list[float]:
        settings = [f"--set={s}" for s in ("train.max_steps=2", "train.eval_time_ratio=0", *more)]
        done = luthier("train", "--model", model_dir("llama"), "--data", rows, "--output-dir", run, *settings)
        assert done.code == 0, done.err
        return list(json.loads((run / "summary.json").read_text())["losses"])

    expected = losses(tmp_path / "plain", "data.cache=false")
    assert not entries(place)
    assert losses(tmp_path / "cold") == losses(tmp_path / "warm") == expected
    assert len(entries(place)) == 1
    shutil.rmtree(place)
