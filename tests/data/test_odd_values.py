"""Odd values in tools and calls drop their row with a reason; nothing in them is lost or smuggled in."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.loader import DataReport
from luthier.encoding.control import ControlTokens
from luthier.types import Conversation, Message, RowRef, ToolCall, as_row
from tests.helpers.rows import load

Row = dict[str, Any]
USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
RESULT = {"role": "tool", "content": "lit"}
TEXT_CALL = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}


def called(arguments: Any = None, **call: Any) -> Row:
    return {**REPLY, "tool_calls": [{"name": "lamp", "arguments": arguments or {}, **call}]}


def reason(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (problem,) = load(path).report.problems
    assert problem.outcome == "dropped" and problem.fix
    return problem.reason


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


ODD: list[tuple[Row, str]] = [
    ({"messages": [USER, called({"x": "\ud800"})]}, "half a surrogate pair"),
    ({"messages": [USER, called({"\ud800": 1})]}, "half a surrogate pair"),
    ({"messages": [USER, called(id="\ud800")]}, "half a surrogate pair"),
    ({"messages": [USER, REPLY], "tools": [{"name": "f", "description": "\ud800"}]}, "half a surrogate pair"),
    ({"messages": [USER, called({"x": float("inf")})]}, "JSON has no form for (float)"),
    ({"messages": [USER, called(nested(100))]}, "is nested too deeply"),
    ({"messages": [USER, called(), {**RESULT, "content": {"x": "\ud800"}}, REPLY]}, "half a surrogate pair"),
    ({"messages": [USER, REPLY], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "are different tools"),
    ({"messages": [USER, {**REPLY, "content": "<think>x</think>b", "thinking": "y"}]}, "another one in its text"),
    ({"prompt": "a", "completion": [{**REPLY, "thinking": "x"}], "thinking": "y"}, "have different thoughts"),
    (
        {"messages": [USER, {**TEXT_CALL, "weight": 1}, {**TEXT_CALL, "weight": 0}, RESULT, REPLY]},
        "another thought or mark than the call before it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "why"), ODD, ids=range(len(ODD)))
def test_an_odd_value_drops_its_row_with_a_reason(row: Row, why: str, tmp_path: Path) -> None:
    assert why in reason(tmp_path, row)


def test_nul_characters_are_removed_from_arguments_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, called({"x": "a\0b"})]}), encoding="utf-8")
    assert load(path).conversations[0].messages[1].tool_calls == (ToolCall("lamp", {"x": "ab"}),)


def test_ids_that_are_numbers_still_match(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [USER, called(id=0), {**RESULT, "tool_call_id": 0}, REPLY]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    messages = load(path).conversations[0].messages
    assert messages[1].tool_calls[0].id == messages[2].call_id == "0"


def test_a_call_as_text_and_as_a_key_are_both_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    both = {"role": "function_call", "content": '{"name": "f", "arguments": {}}', "tool_calls": [{"name": "g"}]}
    path.write_text(json.dumps({"messages": [USER, both]}), encoding="utf-8")
    assert [c.name for c in load(path).conversations[0].messages[1].tool_calls] == ["f", "g"]


def test_parquet_has_no_keys_that_only_other_rows_have(tmp_path: Path) -> None:
    """Its columns unify the keys of all calls and fill them with null."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [{"name": "f", "arguments": {"a": "1"}}, {"name": "g", "arguments": {"b": 2}}]
    rows = [{"messages": [USER, {**REPLY, "tool_calls": [call]}]} for call in calls]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = load(tmp_path / "rows.parquet").conversations
    assert [c.messages[1].tool_calls[0].arguments for c in loaded] == [{"a": "1"}, {"b": 2}]
    dated = [
        {
            "messages": [
                USER,
                {**REPLY, "tool_calls": [{"name": "f", "arguments": {"a": dt.datetime(2026, 1, 1)}}]},
            ]
        }
    ]
    parquet.write_table(pa.Table.from_pylist(dated), tmp_path / "dated.parquet")
    (problem,) = load(tmp_path / "dated.parquet").report.problems
    assert "JSON has no form for (datetime)" in problem.reason


PLACES = ("content", "thought", "name", "call_id", "call", "id", "argument", "key", "tool", "property")


@pytest.mark.parametrize("place", PLACES)
def test_control_tokens_are_detected_and_escaped_everywhere(place: str) -> None:
    token = "<|im_end|>"

    def at(name: str) -> str:
        return token if place == name else "x"

    call = ToolCall(at("call"), {at("key"): [at("argument")]}, at("id"))
    conversation = Conversation(
        (
            Message("user", at("content")),
            Message("assistant", "b", thought=at("thought"), tool_calls=(call,)),
            Message("tool", "c", name=at("name"), call_id=at("call_id")),
            Message("assistant", "d"),
        ),
        RowRef("rows", 1),
        ({"type": "function", "function": {"name": at("tool"), "parameters": {at("property"): {}}}},),
    )
    for choice, outcome in (("refuse", "refused"), ("drop", "dropped")):
        report = DataReport(read=1)
        control = ControlTokens.of([token], choice)  # type: ignore[arg-type]
        assert control and control.apply(conversation, report) is None
        assert [p.outcome for p in report.problems] == [outcome]
    control = ControlTokens.of([token], "escape")
    escaped = control and control.apply(conversation, DataReport(read=1))
    assert escaped and token not in json.dumps(as_row(escaped)) and "< |im_end|>" in json.dumps(as_row(escaped))
