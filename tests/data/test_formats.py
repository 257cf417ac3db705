"""Names of roles and keys, and the kinds of rows that other tools write, are read or refused with a fix that works."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.data.loader import refuse
from luthier.errors import DataError
from luthier.models.tokenizer.tokenizer import Tokenizer
from tests.conftest import Result
from tests.helpers.rows import Loaded, encode, encoder, load

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "S"}
TURNS = [("user", "a"), ("assistant", "b")]
TALK = [SYSTEM, USER, REPLY]


def read(tmp_path: Path, *rows: Any, **options: Any) -> Loaded:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load(path, **options)


def turns(loaded: Loaded, row: int = 0) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in loaded.conversations[row].messages]


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_roles_have_several_names_in_any_letter_case(key: str, names: tuple[str, str], tmp_path: Path) -> None:
    for system in ("system", "developer", "SYSTEM"):
        for user in ("user", "USER", "human", "Human"):
            for reply in ("assistant", "Assistant", "gpt", "chatgpt", "model", "bot", "ai"):
                talk = [(system, "S"), (user, "a"), (reply, "b")]
                rows = read(tmp_path, {key: [dict(zip(names, turn, strict=True)) for turn in talk]})
                assert turns(rows) == [("system", "S"), *TURNS]
                assert rows.report.notes == {}
    narrated = read(tmp_path, {key: [dict(zip(names, ("narrator", "a"), strict=True))]})
    assert "role 'narrator' is not system, user, assistant or tool" in narrated.report.problems[0].reason


def test_a_message_may_have_null_under_the_other_names(tmp_path: Path) -> None:
    others = [{**turn, "from": None, "value": None} for turn in (USER, REPLY)]
    rows = read(tmp_path, {"messages": others, "conversations": None, "instruction": None})
    assert (turns(rows), rows.report.notes) == (TURNS, {})


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_may_be_json_text(key: str, suffix: str, tmp_path: Path) -> None:
    row = {key: json.dumps(TALK), "tools": "[]", "images": ""}
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row))
    elif suffix == "csv":
        with path.open("w", newline="") as f:
            table = csv.DictWriter(f, row)
            table.writeheader()
            table.writerow(row)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist([row]), path)
    rows = load(path)
    assert (turns(rows), rows.report.problems, rows.report.notes) == ([("system", "S"), *TURNS], [], {})


def test_a_history_may_be_json_text_or_empty(tmp_path: Path) -> None:
    row = {"instruction": "c", "output": "d"}
    rows = read(tmp_path, {**row, "history": '[["a", "b"]]'}, {**row, "history": ""}, {**row, "history": "[]"})
    assert turns(rows) == [*TURNS, ("user", "c"), ("assistant", "d")]
    assert turns(rows, 1) == turns(rows, 2) == [("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize("question", ["instruction", "question", "query", "prompt", "input"])
@pytest.mark.parametrize("reply", ["output", "answer", "response", "completion"])
def test_question_and_reply_have_several_names(question: str, reply: str, tmp_path: Path) -> None:
    rows = read(tmp_path, {question: "a", reply: "b", "system_prompt": "S", "id": 1})
    assert (turns(rows), rows.report.problems) == ([("system", "S"), *TURNS], [])
    names = {question: "instruction", reply: "output"}
    if (question, reply) == ("prompt", "completion"):
        names = {}
    assert rows.report.notes == {
        "key 'id' is not used": 1,
        **{f"key '{old}' is read as '{new}'": 1 for old, new in names.items() if old != new},
    }
    empty = read(tmp_path, {question: "a", reply: None}, {question: None, reply: "b"})
    assert [p.reason.rpartition(" ")[2] for p in empty.report.problems] == ["empty", "empty"]
    with_input = read(tmp_path, {question: "a", reply: "b", "input": "c"})
    if question not in ("input", "prompt") or reply != "completion":
        assert turns(with_input)[0] == ("user", "c" if question == "input" else "a\nc")


def test_a_misspelt_instruction_is_not_replaced_by_the_input(tmp_path: Path) -> None:
    rows = read(tmp_path, {"instrution": "a", "input": "c", "output": "b"})
    with pytest.raises(DataError, match="did you mean 'instruction'"):
        refuse(rows.report, 1)


MISNAMED: list[tuple[dict[str, Any], str]] = [
    ({"question": "a", "answer": "b", "response": "c"}, "has the keys question, answer, response: it is unclear"),
    ({"instruction": "a", "answer": "b", "response": "c"}, "has the keys instruction, answer, response"),
    ({"prompt": "a", "query": "c", "output": "b"}, "has the keys query, prompt, output: it is unclear"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences are not trained"),
    ({"question": "a", "chosen": "b", "rejected": "c"}, "preferences are not trained"),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "preferences are not trained"),
    ({"prompt": "a", "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "preferences are not trained"),
    ({"prompt": "a", "chosen": [REPLY], "rejected": [REPLY]}, "preferences are not trained"),
    ({"messages": [USER, REPLY], "rejected_response": "c"}, "rejected_response is not empty"),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "preferences are not trained"),
    ({"instruction": "a", "output": "b", "label": 0}, "label is 0"),
    ({"instruction": "a", "output": "b", "tool_calls": [1]}, "tool_calls is not empty"),
    ({"messages": TALK, "system": "T"}, "different system prompts"),
    ({"messages": [USER, REPLY], "system": "S", "system_prompt": "T"}, "different system prompts"),
]


@pytest.mark.parametrize(("row", "message"), MISNAMED, ids=range(len(MISNAMED)))
def test_typing_the_printed_fix_reads_the_rows(
    row: dict[str, Any], message: str, luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, row]))
    argv = ["check", "--model", model_dir("llama"), "--data", path]
    refused = luthier(*argv)
    assert refused.code == 2
    assert message in refused.err
    fix = refused.err.strip().splitlines()[-1]
    options = re.findall(r"(--[a-z]+) (\S+=\w+)", fix)
    assert options
    done = luthier(*argv, *(word for option in options for word in option), "--json")
    assert json.loads(done.out)["rows"]["kept"] == 2, (fix, done.err)


def test_preferences_without_a_question_are_refused_with_what_to_write(tmp_path: Path) -> None:
    plain = {"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"}
    for row in (plain, {"conversations": [USER, REPLY, USER], "chosen": REPLY, "rejected": REPLY}):
        with pytest.raises(DataError) as e:
            refuse(read(tmp_path, row).report, 1)
        assert "has the keys chosen and rejected" in e.value.message
        assert e.value.fix == "write the chosen replies into the conversations"
    talk = {"messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": [USER, REPLY]}
    assert read(tmp_path, talk).report.notes == {"key 'chosen' is not used": 1, "key 'rejected' is not used": 1}


def test_prompt_and_completion_may_be_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = read(
        tmp_path,
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"prompt": "a", "completion": [REPLY], "system": "S"},
        {"prompt": json.dumps([SYSTEM, USER]), "completion": "b"},
        {"messages": TALK},
    )
    assert rows.report.problems == []
    one, *others = [(e.ids.tolist(), e.trained.tolist()) for e in encode(encoder(tokenizer), rows.conversations)]
    assert others == [one] * 3
    for prompt, completion in (("[1, 2]", "[]"), ('[{"a": 1}]', '[{"role": "keeper"}]')):
        text = read(tmp_path, {"prompt": prompt, "completion": completion})
        assert turns(text) == [("user", prompt), ("assistant", completion)]
    wrong = read(tmp_path, {"prompt": ["a"], "completion": "b"}, {"prompt": [], "completion": "b"})
    assert [p.reason[:19] for p in wrong.report.problems] == ["must be an object w", "prompt must be a li"]


def test_only_the_completion_of_a_conversation_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": [USER, REPLY, USER], "completion": [{**REPLY, "content": "d"}]}
    rows = read(tmp_path, row)
    assert not rows.report.problems
    (example,) = encode(encoder(tokenizer), rows.conversations)
    trained = [p for p, t in zip(tokenizer.pieces(example.ids.tolist()), example.trained, strict=True) if t]
    assert trained == ["d", "<|im_end|>"]
    asked = read(tmp_path, {"prompt": [USER], "completion": [REPLY, USER, REPLY]})
    assert "completion has a message of the role user" in asked.report.problems[0].reason


def test_lists_inside_the_list_of_rows_are_named(tmp_path: Path) -> None:
    good = {"messages": [USER, REPLY]}
    rows = read(tmp_path, good, [good, good], [USER, REPLY])
    assert [(p.reason, p.fix) for p in rows.report.problems] == [
        ("must be an object with keys, got list of rows", "write one list of rows, without lists inside it"),
    ]
    assert [turns(rows, i) for i in range(2)] == [TURNS] * 2  # a list of messages is a row


def test_rows_without_known_keys_name_the_option(tmp_path: Path) -> None:
    rows = read(tmp_path, {"q": "a", "a": "b"})
    with pytest.raises(DataError, match="has none of the keys") as e:
        refuse(rows.report, 1)
    assert "--rename OLD=instruction --rename OLD=output" in e.value.fix


def test_line_ends_and_delimiters_of_old_programs_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": str(i), "output": "b"}) for i in range(3)]
    path = tmp_path / "rows"
    path.write_bytes("\r".join(lines).encode())
    rows = load(path)
    assert [(c.source.row, c.messages[0].content) for c in rows.conversations] == [(1, "0"), (2, "1"), (3, "2")]
    for first in ("sep=;", '"sep=;"', "\ufeffsep=;", "SEP=;"):
        for end in ("\r\n", "\n", "\r"):
            path.write_bytes(f"{first}{end}instruction;output{end}a, a, a;b{end}".encode())
            assert turns(load(path)) == [("user", "a, a, a"), ("assistant", "b")]
    path.write_bytes(b"sep=|\ninstruction|output\na|b\n")
    assert turns(load(path)) == TURNS
