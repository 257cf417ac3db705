"""Messages as data files have them: roles, parts, thoughts, tools, calls, flags, and who speaks first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.types import Message, ToolCall, as_row
from tests.helpers.rows import Loaded, load

Row = dict[str, Any]
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
FUNCTION = {"name": "lamp", "description": "light it", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
CALLED = ToolCall("lamp", {"on": True}, "c1")
RESULT = {"role": "tool", "content": "lit"}


def read(tmp_path: Path, *rows: Any) -> Loaded:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load(path)


def messages(tmp_path: Path, *turns: Row, **row: Any) -> tuple[Message, ...]:
    """Return the messages of a row that must be kept."""
    loaded = read(tmp_path, {"messages": list(turns), **row})
    assert loaded.report.kept == 1, loaded.report.problems
    return loaded.conversations[0].messages


def reason(tmp_path: Path, *turns: Row, **row: Any) -> str:
    """Return why a row is dropped."""
    (problem,) = read(tmp_path, {"messages": list(turns), **row}).report.problems
    assert problem.outcome == "dropped"
    return problem.reason


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("value", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps(FUNCTION), [json.dumps(TOOL)]])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ],
    ids=["messages", "sharegpt", "alpaca", "prompt_completion"],
)
def test_tools_are_read_beside_every_kind_of_row(row: Row, value: Any, key: str, tmp_path: Path) -> None:
    loaded = read(tmp_path, {**row, key: value}, row)
    assert loaded.report.problems == []
    assert loaded.report.notes == {}
    assert [c.tools for c in loaded.conversations] == [(TOOL,), ()]
    assert len({json.dumps(as_row(c)) for c in loaded.conversations}) == 2


def test_parameters_of_a_tool_may_be_json_text(tmp_path: Path) -> None:
    """As Parquet files without one schema for all tools have them."""
    text = {**TOOL, "function": {**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}}
    assert read(tmp_path, {"messages": [USER, REPLY], "tools": [text]}).conversations[0].tools == (TOOL,)


@pytest.mark.parametrize("value", [[1], ["lamp"], [{"description": "x"}], {"name": 3}])
def test_something_else_as_tools_drops_the_row(value: Any, tmp_path: Path) -> None:
    assert "is not the description of a tool" in reason(tmp_path, USER, REPLY, tools=value)


# --- calls and results ------------------------------------------------------------------------------------------------

CALLS = {
    "OpenAI": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "OpenAI, arguments as text": [
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "lamp", "arguments": '{"on": true}'}}]}
    ],
    "OpenAI, calls as text": [{"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}],
}
ANONYMOUS = {
    "OpenAI's older form": [{"role": "assistant", "function_call": {"name": "lamp", "arguments": '{"on": true}'}}],
    "LLaMA-Factory": [{"from": "function_call", "value": '{"name": "lamp", "arguments": {"on": true}}'}],
    "ms-swift": [{"role": "tool_call", "content": '{"name": "lamp", "arguments": {"on": true}}'}],
    "Hermes": [
        {"from": "gpt", "value": '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call>'}
    ],
}  # fmt: skip
RESULTS = (
    {"role": "tool", "content": "lit", "tool_call_id": "c1", "name": "lamp"},
    {"role": "function", "name": "lamp", "content": "lit"},
    {"role": "ipython", "content": "lit"},
    {"role": "tool_response", "content": "lit"},
    {"from": "observation", "value": "lit"},
    {"from": "tool", "value": "<tool_response>\nlit\n</tool_response>"},
    {"role": "tool", "content": [{"type": "text", "text": "lit"}]},
)


@pytest.mark.parametrize("result", RESULTS, ids=range(len(RESULTS)))
@pytest.mark.parametrize("form", [*CALLS, *ANONYMOUS])
def test_calls_and_results_are_read_in_every_form(form: str, result: Row, tmp_path: Path) -> None:
    called = {**CALLS, **ANONYMOUS}[form]
    user, call, answer, reply = messages(tmp_path, USER, *called, result, REPLY)
    assert (user, reply) == (Message("user", "a"), Message("assistant", "b"))
    expected = CALLED if form in CALLS else ToolCall("lamp", {"on": True})
    assert call == Message("assistant", "", tool_calls=(expected,))
    assert (answer.role, answer.content) == ("tool", "lit")
    assert answer.name == result.get("name", "") and answer.call_id == result.get("tool_call_id", "")


def test_a_conversation_with_tools_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    """The held-out rows of a run are written for luthier eval."""
    turns = [USER, {**REPLY, "tool_calls": [CALL], "reasoning_content": "hm"}, RESULTS[0], {**REPLY, "weight": 0}]
    first = read(tmp_path, {"messages": [*turns, USER, REPLY], "tools": [TOOL]}).conversations[0]
    again = read(tmp_path, as_row(first)).conversations[0]
    assert again == first


def test_one_call_per_message_is_a_parallel_call(tmp_path: Path) -> None:
    call = {"role": "tool_call", "content": '{"name": "lamp", "arguments": {}}'}
    roles = [m.role for m in messages(tmp_path, USER, call, call, RESULT, RESULT, REPLY)]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    two = messages(tmp_path, USER, call, call, RESULT, REPLY)[1]
    assert [c.name for c in two.tool_calls] == ["lamp", "lamp"]


def test_text_before_hermes_calls_is_kept_and_calls_within_a_text_are_text(tmp_path: Path) -> None:
    block = '<tool_call>\n{"name": "lamp", "arguments": {}}\n</tool_call>'
    said = messages(tmp_path, USER, {"role": "assistant", "content": f"I look.\n{block}\n{block}"}, RESULT, REPLY)[1]
    assert (said.content, len(said.tool_calls)) == ("I look.", 2)
    within = messages(tmp_path, USER, {"role": "assistant", "content": f"Write {block} to call."})[1]
    assert within.tool_calls == () and "<tool_call>" in within.content


def test_a_result_that_is_an_object_becomes_json_text(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {"messages": [USER, {**REPLY, "tool_calls": [CALL]}, {**RESULT, "content": {"w": "雨"}}, REPLY]}
    )
    assert rows.conversations[0].messages[2].content == '{"w": "雨"}'
    assert [p.outcome for p in rows.report.problems] == ["changed"]


BAD_CALLS: list[tuple[list[Row], str]] = [
    ([{**REPLY, "tool_calls": [CALL]}], "expected tool"),
    ([{**REPLY, "tool_calls": [{"name": 1}]}], "messages[2].tool_calls[1] is not a tool call"),
    ([{**REPLY, "tool_calls": "lamp()"}], "messages[2].tool_calls is not a tool call"),
    ([{"role": "tool_call", "content": "lamp()"}], "messages[2] is not a tool call"),
    ([{**REPLY, "tool_calls": [{"name": "lamp", "arguments": "on"}]}], "is not a tool call"),
    ([{"role": "assistant", "content": "<tool_call>lamp</tool_call>"}], "messages[2] is not a tool call"),
]


@pytest.mark.parametrize(("turns", "why"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_call_that_cannot_be_read_drops_the_row(turns: list[Row], why: str, tmp_path: Path) -> None:
    assert why in reason(tmp_path, USER, *turns, USER, REPLY)


def test_a_result_follows_a_reply(tmp_path: Path) -> None:
    assert reason(tmp_path, USER, RESULT, REPLY) == "turn 2 has the role tool, expected assistant"
    wrong = reason(tmp_path, USER, {**REPLY, "tool_calls": [CALL]}, RESULT, USER, REPLY)
    assert wrong == "turn 4 has the role user, expected assistant or tool"


def test_a_call_at_the_end_is_trained(tmp_path: Path) -> None:
    turns = messages(tmp_path, USER, {**REPLY, "tool_calls": [CALL]})
    assert turns[-1].tool_calls == (CALLED,) and turns[-1].trained


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_the_thought_of_a_reply_is_a_field_of_its_own(key: str, tmp_path: Path) -> None:
    assert messages(tmp_path, USER, {**REPLY, key: "hm"})[1] == Message("assistant", "b", thought="hm")
    if key != "reasoning":
        for row in ({"instruction": "a", "output": "b", key: "hm"}, {"prompt": "a", "completion": "b", key: "hm"}):
            assert read(tmp_path, row).conversations[0].messages[-1].thought == "hm"


def test_two_thoughts_of_a_reply_must_agree(tmp_path: Path) -> None:
    assert messages(tmp_path, USER, {**REPLY, "thinking": "hm", "reasoning_content": "hm\n"})[1].thought == "hm\n"
    why = reason(tmp_path, USER, {**REPLY, "thinking": "hm", "reasoning_content": "ah"})
    assert why == "messages[2].reasoning_content and messages[2].thinking are different thoughts"
    assert "messages[2].thinking must be text, got bool" in reason(tmp_path, USER, {**REPLY, "thinking": True})


# --- who speaks, and when ---------------------------------------------------------------------------------------------


def test_a_reply_before_the_first_question_is_context(tmp_path: Path) -> None:
    for opening in ([], [{"role": "system", "content": "S"}]):
        turns = messages(tmp_path, *opening, {"role": "assistant", "content": "Welcome."}, USER, REPLY)
        assert [(m.content, m.trained) for m in turns if m.role == "assistant"] == [("Welcome.", False), ("b", True)]
    rows = read(tmp_path, {"conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "a"},
                                             {"from": "gpt", "value": "b"}]})  # fmt: skip
    assert rows.report.notes == {"the reply before the first question is context only": 1}
    assert "the first turn has the role assistant, expected user" in reason(tmp_path, REPLY)


def test_a_list_of_turns_is_a_row(tmp_path: Path) -> None:
    """As an element of an array, and as a line of a JSONL file."""
    rows = read(tmp_path, [USER, REPLY], [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
    assert [[(m.role, m.content) for m in c.messages] for c in rows.conversations] == [
        [("user", "a"), ("assistant", "b")]
    ] * 2
    path = tmp_path / "array.json"
    path.write_text(json.dumps([[USER, REPLY], [USER, REPLY]]), encoding="utf-8")
    assert load(path).report.kept == 2


def test_messages_may_be_json_text_in_every_kind_of_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import csv

    import pyarrow as pa
    from pyarrow import parquet

    text = json.dumps([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, REPLY])
    tools = json.dumps([TOOL])
    parquet.write_table(pa.table({"messages": [text], "tools": [tools]}), tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["messages", "tools"], [text, tools]])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": text, "tools": tools}), encoding="utf-8")
    read_rows = [load(tmp_path / name).conversations[0] for name in ("rows.parquet", "rows.csv", "rows.jsonl")]
    assert all((c.messages, c.tools) == (read_rows[0].messages, (TOOL,)) for c in read_rows)
    assert read_rows[0].messages[1].tool_calls == (CALLED,)


def test_two_system_prompts_in_the_turns_are_joined(tmp_path: Path) -> None:
    first, second = ({"role": "system", "content": text} for text in "ST")
    rows = read(tmp_path, {"messages": [first, second, USER, REPLY]}, {"messages": [first, first, USER, REPLY]})
    assert [c.messages[0].content for c in rows.conversations] == ["S\n\nT", "S"]
    assert [(p.source.row, p.reason) for p in rows.report.problems] == [(1, "two system prompts were joined")]
    assert "turn 3 has the role system, expected user or tool" in reason(tmp_path, USER, REPLY, first, USER, REPLY)
    assert "are different system prompts" in reason(tmp_path, first, USER, REPLY, system="T")


def test_parts_of_a_text_may_be_texts(tmp_path: Path) -> None:
    parts = [{"type": "input_text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert messages(tmp_path, {"role": "user", "content": parts}, REPLY)[0].content == "abc"
