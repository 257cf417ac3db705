"""Every row is counted, and every problem names the file, the row and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import personas
from luthier.data import loader
from luthier.errors import DataError
from luthier.types import Message
from tests.helpers.rows import Loaded
from tests.helpers.rows import load as read

GOOD = {"instruction": "Hello", "input": "", "output": "Gannet Rock here."}


class Raw(str):
    """A line of JSONL that is written unchanged."""


def load(tmp_path: Path, rows: Any, name: str = "rows.json", **kwargs: Any) -> Loaded:
    path = tmp_path / name
    if name.endswith("l"):
        path.write_text("\n".join(r if isinstance(r, Raw) else json.dumps(r) for r in rows), encoding="utf-8")
    else:
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    loaded = read(path, **kwargs)
    report = loaded.report
    assert report.kept + report.dropped == report.read
    assert len(loaded.conversations) == report.kept
    assert all(p.source.file == str(path) and p.source.row >= 1 and p.reason for p in report.problems)
    return loaded


def turns(loaded: Loaded, row: int = 0) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in loaded.conversations[row].messages]


def test_alpaca_rows_become_conversations(tmp_path: Path) -> None:
    row = {**GOOD, "input": "Marlow", "system": "Be kind.", "history": [["a", "b"], ["c", "d"]]}
    assert turns(load(tmp_path, [row])) == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "Hello\nMarlow"),
        ("assistant", "Gannet Rock here."),
    ]


def test_message_rows_become_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    loaded = load(tmp_path, [{"messages": messages}, {"messages": [{"role": "system", "content": ""}, *messages]}])
    assert turns(loaded, 0) == turns(loaded, 1) == [("user", "a"), ("assistant", "b")]
    assert set(loaded.report.formats.values()) == {"messages"}


def test_a_system_prompt_goes_to_rows_that_have_none(tmp_path: Path) -> None:
    loaded = load(tmp_path, [GOOD, {**GOOD, "system": "own"}], system="Given.")
    assert [c.messages[0] for c in loaded.conversations] == [Message("system", "Given."), Message("system", "own")]


DROPPED = [
    ({"instruction": "a"}, "has no key 'output'"),
    ({**GOOD, "output": ""}, "output is empty"),
    ({**GOOD, "output": " \n"}, "output is empty"),
    ({**GOOD, "output": None}, "output is empty"),
    ({**GOOD, "instruction": ""}, "instruction is empty"),
    ({**GOOD, "output": ["a"]}, "output must be text, got list"),
    ({**GOOD, "instruction": {"a": 1}}, "instruction must be text, got dict"),
    ({**GOOD, "history": "a"}, "history must be a list"),
    ({**GOOD, "history": [["a"]]}, "history must be a list"),
    ({**GOOD, "history": [["", "b"]]}, "a user message is empty"),
    ({**GOOD, "output": "\ud83d"}, "surrogate"),
    ("text", "must be an object with keys, got str"),
    (None, "must be an object with keys, got NoneType"),
    ([GOOD], "must be an object with keys, got list"),
]


@pytest.mark.parametrize(("row", "reason"), DROPPED)
def test_a_bad_row_is_dropped_with_its_number_and_reason(row: Any, reason: str, tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        report = load(tmp_path, [GOOD, row, GOOD], name).report
        assert report.rows() == {"read": 3, "kept": 2, "dropped": 1, "changed": 0}
        assert report.problems[0].source.row == 2
        assert reason in report.problems[0].reason


MESSAGES = [
    ([], "at least one message"),
    ("a", "must be a list"),
    ([{"role": "user", "content": "a"}], "has no assistant reply"),
    ([{"role": "assistant", "content": "a"}], "the first turn has the role assistant, expected user"),
    (
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        "turn 2",
    ),
    ([{"role": "usr", "content": "a"}, {"role": "assistant", "content": "c"}], "did you mean user?"),
    (
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}],
        "turn 2",
    ),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "a reply is empty"),
    ([{"role": "user", "content": "a"}, {"role": "assistant"}], "has no key 'content'"),
    (["a", "b"], "must be an object"),
]


@pytest.mark.parametrize(("messages", "reason"), MESSAGES)
def test_a_bad_conversation_is_dropped_with_its_reason(messages: Any, reason: str, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report = load(tmp_path, [good, {"messages": messages}]).report
    assert report.rows() == {"read": 2, "kept": 1, "dropped": 1, "changed": 0}
    assert reason in report.problems[0].reason


def test_changed_rows_are_kept_and_counted(tmp_path: Path) -> None:
    trailing = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    loaded = load(tmp_path, [{**GOOD, "instruction": 7, "output": 3.5}, GOOD])
    assert loaded.report.rows() == {"read": 2, "kept": 2, "dropped": 0, "changed": 1}
    assert turns(loaded) == [("user", "7"), ("assistant", "3.5")]
    cut = load(tmp_path, [{"messages": trailing}])
    assert cut.report.changed == 1
    assert turns(cut) == [("user", "a"), ("assistant", "b")]


def test_a_null_input_counts_as_no_input(tmp_path: Path) -> None:
    loaded = load(tmp_path, [{**GOOD, "input": None}, {"instruction": "a", "output": "b"}])
    assert loaded.report.rows() == {"read": 2, "kept": 2, "dropped": 0, "changed": 0}


def test_lines_that_are_not_json_count_as_dropped_rows(tmp_path: Path) -> None:
    report = load(
        tmp_path, [GOOD, Raw("{broken"), Raw(""), GOOD, Raw('{"instruction": "a", "out')], "rows.jsonl"
    ).report
    assert report.rows() == {"read": 4, "kept": 2, "dropped": 2, "changed": 0}
    assert [p.source.row for p in report.problems] == [2, 5]


def test_a_misspelt_key_refuses_the_file_with_the_correct_name_and_the_number_of_rows(tmp_path: Path) -> None:
    loaded = load(tmp_path, [GOOD, *[{"instrution": "a", "output": "b"}] * 3])
    with pytest.raises(DataError) as e:
        loader.refuse(loaded.report, 1)
    assert e.value.message.endswith(
        "rows.json:2: key 'instrution' is unknown; did you mean 'instruction'? (2 more rows)"
    )
    assert e.value.fix == "correct the rows, or pass --rename instrution=instruction"


def test_the_correct_names_are_suggested_if_all_required_keys_are_misspelt(tmp_path: Path) -> None:
    loaded = load(tmp_path, [{"instrution": "a", "ouput": "b"}])
    with pytest.raises(DataError, match="did you mean 'instruction'"):
        loader.refuse(loaded.report, 1)


def test_unknown_keys_are_noted(tmp_path: Path) -> None:
    report = load(tmp_path, [{**GOOD, "index": 1, "sytem": "x"}, {**GOOD, "index": 2}]).report
    assert report.kept == 2
    assert report.notes["key 'index' is not used"] == 2
    assert report.notes["key 'sytem' is not used; did you mean 'system'?"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("hello", "neither JSON, JSONL, CSV, TSV nor Parquet"),
        ('[{"instruction": 1} nonsense, {"output": 1}]', "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_file_without_data_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_refused_with_a_similar_file_name(tmp_path: Path) -> None:
    (tmp_path / "huanhuan.json").write_text("[]")
    with pytest.raises(DataError) as e:
        read(tmp_path / "huahuan.json")
    assert "does not exist" in e.value.message
    assert "huanhuan.json" in e.value.fix
    with pytest.raises(DataError, match="is a directory"):
        read(tmp_path)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row can be used \(0 read\)"):
        loader.refuse(load(tmp_path, []).report, 1)


def test_byte_order_marks_crlf_and_a_single_object_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\r\n").encode() * 2)
    assert read(path).report.kept == 2
    assert load(tmp_path, json.dumps(GOOD, indent=2)).report.rows()["kept"] == 1
    path.write_bytes(b'[{"instruction": "\xff", "output": "a"}]')
    assert read(path).report.rows()["dropped"] == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["instruction", "input", "output", "system", "history", "messages", "outptu", "role", "id"])


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.dictionaries(keys, values, max_size=5) | values, max_size=6), lines=st.booleans())
def test_the_counts_add_up_for_any_rows(rows: list[Any], lines: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.json"
    rows = [r for r in rows if isinstance(r, dict) or not lines]  # a line that starts with [ would start an array
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    try:
        loaded = read(path)
    except DataError:
        assert lines
        return
    report = loaded.report
    assert report.read == len(rows)
    assert report.kept + report.dropped == report.read
    assert len(loaded.conversations) == report.kept
    assert len({p.source.row for p in report.problems if p.outcome != "changed"}) == report.dropped


def test_the_shipped_rows_are_valid_and_distinct() -> None:
    counts = {personas.TRAIN: 240, personas.HELD_OUT: 24, personas.TEAHOUSE: 60}
    prompts: set[str] = set()
    replies: set[str] = set()
    for file, least in counts.items():
        loaded = read(file)
        assert loaded.report.rows() == {
            "read": loaded.report.read,
            "kept": loaded.report.read,
            "dropped": 0,
            "changed": 0,
        }
        assert loaded.report.read >= least
        for c in loaded.conversations:
            assert c.messages[0].content not in prompts
            assert c.messages[1].content not in replies
            prompts.add(c.messages[0].content)
            replies.add(c.messages[1].content)


def test_every_row_of_huanhuan_is_kept(huanhuan: Path) -> None:
    loaded = read(huanhuan)
    assert loaded.report.rows() == {"read": 3729, "kept": 3729, "dropped": 0, "changed": 0}
