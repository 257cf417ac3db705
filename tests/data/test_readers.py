"""Property tests of the readers: every file type is read back exactly, and damage affects only the rows it hits."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.loader import Loader
from luthier.errors import DataError

Pair = tuple[str, str]
# characters that both GB18030 and UTF-8 can encode, and the syntax characters of the file types
text = st.text(st.sampled_from("ab 你好皇上是的，。\n\t\"',;{}[]\\:"), min_size=1, max_size=12).filter(
    lambda t: bool(t.strip())
)
pairs = st.lists(st.tuples(text, text), min_size=1, max_size=6)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"])
breaks = st.sampled_from(["\n", "\r\n"])
forms = st.sampled_from(["lines", "array", "array on several lines", "under data", "commas", "semicolons", "tabs"])


def read(path: Path) -> tuple[list[Pair], Loader]:
    loader = Loader([path])
    pairs = [(c.messages[0].content, c.messages[1].content) for c in loader]
    rows = loader.report.rows()
    assert rows["kept"] + rows["dropped"] == rows["read"]
    assert rows["kept"] == len(pairs)
    return pairs, loader


def written(rows: list[Pair], form: str, line_end: str) -> str:
    values = [{"instruction": a, "output": b} for a, b in rows]
    if form == "lines":
        return line_end.join(json.dumps(v, ensure_ascii=False) for v in values) + line_end
    if form == "under data":
        return json.dumps({"version": 1, "data": values}, ensure_ascii=False)
    if form.startswith("array"):
        return json.dumps(values, ensure_ascii=False, indent=2 if form.endswith("lines") else None)
    out = io.StringIO()
    table = csv.writer(
        out, delimiter={"commas": ",", "semicolons": ";", "tabs": "\t"}[form], lineterminator=line_end,
        quoting=csv.QUOTE_ALL,
    )  # fmt: skip
    table.writerow(["instruction", "output"])
    table.writerows(rows)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@settings(max_examples=150, deadline=None)
@given(rows=pairs, form=forms, encoding=encodings, line_end=breaks)
def test_rows_are_read_back_as_they_were_written(
    rows: list[Pair], form: str, encoding: str, line_end: str, folder: Path
) -> None:
    path = folder / "rows.data"
    path.write_bytes(written(rows, form, line_end).encode(encoding))
    pairs_read, loader = read(path)
    assert pairs_read == rows
    assert loader.report.rows() == {"read": len(rows), "kept": len(rows), "dropped": 0, "changed": 0}


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(text, text), min_size=2, max_size=6), draw=st.data(), line_end=breaks)
def test_damage_to_a_line_affects_only_that_row(
    rows: list[Pair], draw: st.DataObject, line_end: str, folder: Path
) -> None:
    path = folder / "rows.jsonl"
    lines = written(rows, "lines", line_end).encode().split(b"\n")[:-1]
    hit = draw.draw(st.integers(1, len(rows) - 1), "row")  # the file type is detected from the first line
    at = draw.draw(st.integers(0, len(lines[hit]) - 1), "byte")
    damage = draw.draw(st.binary(min_size=1, max_size=3).filter(lambda b: b"\n" not in b), "damage")
    lines[hit] = lines[hit][:at] + damage + lines[hit][at + 1 :]
    path.write_bytes(b"\n".join(lines))
    loader = Loader([path])
    intact = {c.source.row: (c.messages[0].content, c.messages[-1].content) for c in loader}
    blank = not lines[hit].strip()
    assert loader.report.read == len(rows) - blank
    assert {row: intact[row] for row in intact if row != hit + 1} == {
        i: row for i, row in enumerate(rows, 1) if i != hit + 1
    }
    assert all(p.source.row == hit + 1 for p in loader.report.problems)


PIECES = [
    *(bytes([c]) for c in b'{}[]",:\n\r\0 1'), b"\\u", b"\xff", b"\xfe", b"\xef\xbb\xbf", b"\xc4\xe3", b"null",
    b'"instruction"', b'"output"', b"instruction,output\n", b'{"instruction": "a", "output": "b"}',
]  # fmt: skip
nearly_rows = st.lists(st.sampled_from(PIECES), max_size=24).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=80) | nearly_rows, name=st.sampled_from(["a.json", "a.csv"]))
def test_any_bytes_are_read_or_refused(raw: bytes, name: str, folder: Path) -> None:
    """The result is rows or a DataError with a fix, never another exception, and every row is counted."""
    path = folder / name
    path.write_bytes(raw)
    loader = Loader([path])
    refused = None
    try:
        rows = len(list(loader))
    except DataError as e:
        refused = e
    if refused:
        assert str(path) in refused.message
        assert refused.fix
        return
    report = loader.report
    assert (report.kept, report.kept + report.dropped) == (rows, report.read)
    assert len({p.source.row for p in report.problems if p.outcome != "changed"}) == report.dropped


def test_a_truncated_file_loses_only_what_was_cut_off(folder: Path) -> None:
    """In every prefix of a file of every type, complete rows are read and the truncated one is counted."""
    rows = [("a", "b"), ("你好", "皇上好"), ("c\nd", 'e "f"')]
    for form in ("lines", "array", "array on several lines", "commas"):
        raw = written(rows, form, "\n").encode()
        refused = 0
        for size in range(1, len(raw)):
            path = folder / "truncated"
            path.write_bytes(raw[:size])
            try:
                pairs_read, loader = read(path)
            except DataError:
                refused += 1
                continue
            complete = [r for r in pairs_read if r in rows]
            assert complete == rows[: len(complete)]
            assert loader.report.read - len(complete) <= 1
        assert refused < len(raw) if form == "commas" else refused == 0, form  # refused if truncated inside quotes


def test_rows_longer_than_a_read_block_are_read(folder: Path) -> None:
    """Also in reasonable time: the blocks that are read grow with the row."""
    long = "灯" * 3_000_000
    for form in ("lines", "array"):
        (folder / "long").write_text(written([("a", long), ("b", "c")], form, "\n"), encoding="utf-8")
        pairs_read, _ = read(folder / "long")
        assert pairs_read == [("a", long), ("b", "c")]
