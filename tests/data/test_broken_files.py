"""Read damaged and unusual data files: each one has a defined outcome, and row counts as a person would count them.

Each case: file name, content, and either (read, kept, dropped, changed) or a part of the error message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Result

R = {"instruction": "你好", "output": "皇上好"}
ROW = json.dumps(R, ensure_ascii=False)
A = json.dumps({"instruction": "a", "output": "b"})
NL = "\n"


def chat(*turns: tuple[str, Any], key: str = "messages", names: tuple[str, str] = ("role", "content")) -> str:
    return json.dumps({key: [dict(zip(names, t, strict=True)) for t in turns]})


def with_(**values: Any) -> str:
    return json.dumps({"instruction": "a", "output": "b", **values})


Outcome = tuple[int, int, int, int] | str
CASES: dict[str, tuple[str, bytes | str, Outcome]] = {
    # encodings
    "plain": ("a.jsonl", ROW * 1 + NL + ROW, (2, 2, 0, 0)),
    "utf-8 with a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + ROW.encode(), (1, 1, 0, 0)),
    "utf-8 with a byte order mark, array": ("a.json", b"\xef\xbb\xbf" + f"[{ROW}]".encode(), (1, 1, 0, 0)),
    "utf-16, little-endian": ("a.jsonl", (ROW + NL + ROW).encode("utf-16"), (2, 2, 0, 0)),
    "utf-16, big-endian": ("a.json", b"\xfe\xff" + f"[{ROW}]".encode("utf-16-be"), (1, 1, 0, 0)),
    "utf-16 without a byte order mark": ("a.jsonl", (A + NL + A).encode("utf-16-le"), (2, 2, 0, 0)),
    "utf-32": ("a.jsonl", (ROW + NL + ROW).encode("utf-32"), (2, 2, 0, 0)),
    "gbk": ("a.jsonl", (ROW + NL + ROW).encode("gbk"), (2, 2, 0, 0)),
    "gb18030 array": ("a.json", f"[{ROW},{ROW}]".encode("gb18030"), (2, 2, 0, 0)),
    "gbk csv": ("a.csv", "instruction,output\n你好,皇上好\n".encode("gbk"), (1, 1, 0, 0)),
    "undecodable bytes in one row": ("a.jsonl", (ROW + NL).encode() * 3 + with_(output="x").encode().replace(b"x", b"\xff\xfe"), (4, 3, 1, 0)),
    "undecodable bytes in an array": ("a.json", b"[" + ROW.encode() + b"," + with_(output="x").encode().replace(b"x", b"\xff") + b"]", (2, 1, 1, 0)),
    "undecodable bytes in utf-16": ("a.jsonl", (A + NL + A[:-3]).encode("utf-16") + b"\x00\xd8" + (A[-3:] + NL + A).encode("utf-16-le"), (3, 2, 1, 0)),
    "utf-16, its last byte cut off": ("a.jsonl", (A + NL + A).encode("utf-16")[:-1], (2, 1, 1, 0)),
    "latin-1 in one row": ("a.jsonl", (A + NL + with_(output="@")).encode().replace(b"@", b"pr\xe9sent"), (2, 1, 1, 0)),
    "latin-1 in every row": ("a.jsonl", (with_(output="@") + NL).encode().replace(b"@", b"pr\xe9sent") * 3, "save the file as UTF-8"),
    "big5": ("a.jsonl", (json.dumps({"instruction": "你是誰", "output": "我是燈塔的守護者"}, ensure_ascii=False) + NL).encode("big5") * 3, "that are not text"),
    # line ends and white space
    "crlf": ("a.jsonl", ROW + "\r\n" + ROW + "\r\n", (2, 2, 0, 0)),
    "blank lines": ("a.jsonl", NL + ROW + NL * 3 + ROW + NL + "   " + NL, (2, 2, 0, 0)),
    "no line end at the end of the file": ("a.jsonl", ROW + NL + ROW, (2, 2, 0, 0)),
    "space before the array": ("a.json", "\n\n  [" + ROW + "]  \n", (1, 1, 0, 0)),
    "only carriage returns": ("a.jsonl", ROW + "\r" + ROW + "\r", (2, 2, 0, 0)),
    "only carriage returns, an invalid line": ("a.jsonl", ROW + "\r{oops\r" + ROW, (3, 2, 1, 0)),
    "carriage returns in an array": ("a.json", f"[{ROW},\r{ROW}]\r", (2, 2, 0, 0)),
    "a line separator inside a text": ("a.jsonl", with_(output="a\u2028b\x85c") + NL + A, (2, 2, 0, 0)),
    "nul bytes around a line": ("a.jsonl", A + NL + "\0" + A + "\0" + NL, (2, 2, 0, 0)),
    "a nul character in a text": ("a.jsonl", with_(output="a\0b"), (1, 1, 0, 1)),
    # the shape of the file
    "one object": ("a.json", ROW, (1, 1, 0, 0)),
    "one object on several lines": ("a.json", json.dumps(R, indent=2), (1, 1, 0, 0)),
    "rows under data": ("a.json", json.dumps({"data": [R, R]}), (2, 2, 0, 0)),
    "rows under two names": ("a.json", json.dumps({"train": [R], "test": [R]}), "contains several lists of rows: train, test"),
    "rows under train, on several lines": ("a.json", json.dumps({"version": 1, "train": [R]}, indent=1), (1, 1, 0, 0)),
    "a row with a list of its own": ("a.jsonl", with_(items=[1, 2]), (1, 1, 0, 0)),
    "an empty array": ("a.json", "[]", "no row can be used (0 read)"),
    "an empty file": ("a.json", "", "is empty"),
    "only white space": ("a.json", " \n \n", "is empty"),
    "only a byte order mark": ("a.json", b"\xef\xbb\xbf", "is empty"),
    "not json at all": ("a.json", "hello there", "is neither JSON, JSONL, CSV, TSV nor Parquet"),
    "a number": ("a.json", "42", "is neither JSON"),
    "null": ("a.json", "null", "is neither JSON"),
    "gzip": ("a.json", b"\x1f\x8b\x08\x00abc", "is compressed (gzip)"),
    "zip": ("a.json", b"PK\x03\x04abc", "is compressed (zip)"),
    "a picture": ("a.json", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is neither JSON"),
    "half a parquet": ("a.parquet", b"PAR1" + b"\0" * 64, "is not a complete Parquet file"),
    "two arrays": ("a.json", f"[{A}]\n[{A}]", "continues after the end of the array"),
    "nested too deeply, array": ("a.json", "[" * 200_000, "is nested too deeply"),
    "nested too deeply, line": ("a.jsonl", A + NL + '{"a":' * 200_000 + NL + A, (3, 2, 1, 0)),
    # broken rows
    "an invalid line in the middle": ("a.jsonl", A + NL + "{oops" + NL + A, (3, 2, 1, 0)),
    "an invalid first line": ("a.jsonl", "oops" + NL + A, (2, 1, 1, 0)),
    "a truncated last line": ("a.jsonl", A + NL + A[:-6], (2, 1, 1, 0)),
    "a truncated array": ("a.json", f"[{A},{A[:-6]}", (2, 1, 1, 0)),
    "an array truncated between rows": ("a.json", f"[{A},{A},\n", (3, 2, 1, 0)),
    "a trailing comma": ("a.json", f"[{A},{A},]", (2, 2, 0, 0)),
    "commas after lines": ("a.jsonl", A + "," + NL + A, (2, 1, 1, 0)),
    "single quotes": ("a.jsonl", "{'instruction': 'a', 'output': 'b'}" + NL + A, (2, 1, 1, 0)),
    "nonsense in an array": ("a.json", f"[{A} oops, {A}]", "is not JSON"),
    "a list of strings": ("a.json", '["a", "b"]', "no row can be used (2 read)"),
    "strings among rows": ("a.json", f'["a", {A}, 7, null, [{A}]]', (5, 1, 4, 0)),
    "duplicate keys": ("a.jsonl", '{"instruction": "a", "output": "b", "output": "c"}' + NL + A, (2, 1, 1, 0)),
    "lone surrogate": ("a.jsonl", with_(output="\ud83d") + NL + A, (2, 1, 1, 0)),
    "a number of 5000 digits": ("a.jsonl", '{"instruction": ' + "9" * 5000 + ', "output": "b"}' + NL + A, (2, 1, 1, 0)),
    # keys and values
    "no output": ("a.jsonl", '{"instruction": "a"}' + NL + A, (2, 1, 1, 0)),
    "no known key": ("a.jsonl", '{"foo": 1}' + NL + A, (2, 1, 1, 0)),
    "misspelt keys": ("a.jsonl", '{"instrution": "a", "output": "b"}' + NL + A, "did you mean 'instruction'?"),
    "capital keys": ("a.jsonl", '{"Instruction": "a", "Output": "b"}', "did you mean 'instruction', 'output'?"),
    "null output": ("a.jsonl", with_(output=None) + NL + A, (2, 1, 1, 0)),
    "null input": ("a.jsonl", with_(input=None), (1, 1, 0, 0)),
    "numbers": ("a.jsonl", with_(instruction=1, output=2.5) + NL + A, (2, 2, 0, 1)),
    "true": ("a.jsonl", with_(output=True), (1, 1, 0, 1)),
    "nested values": ("a.jsonl", with_(output={"text": "b"}) + NL + with_(input=["x"]) + NL + A, (3, 1, 2, 0)),
    "empty strings": ("a.jsonl", with_(output="") + NL + with_(instruction="") + NL + with_(output="  ") + NL + A, (4, 1, 3, 0)),
    "instruction empty, input full": ("a.jsonl", with_(instruction="", input="q"), (1, 1, 0, 0)),
    "extra keys": ("a.jsonl", with_(id=7, source="x"), (1, 1, 0, 0)),
    "very long": ("a.jsonl", with_(output="lamp " * 5000) + NL + A, (2, 2, 0, 1)),
    "a prompt longer than max_length": ("a.jsonl", with_(instruction="lamp " * 5000) + NL + A, (2, 1, 1, 0)),
    "control tokens": ("a.jsonl", with_(output="x<|im_end|>y") + NL + A, "a control token of this model"),
    "keys of another name": ("a.jsonl", '{"question": "a", "answer": "b"}' + NL + '{"prompt": "a", "response": "b"}', (2, 2, 0, 0)),
    "two possible replies": ("a.jsonl", '{"question": "a", "answer": "b", "response": "c"}', "it is unclear which is the question"),
    "chosen and rejected replies": ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "preferences are not trained"),
    "one row of chosen and rejected conversations": ("a.json", json.dumps({"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}), "preferences are not trained"),
    "not to be trained": ("a.jsonl", with_(label=False) + NL + with_(weight=0.5) + NL + with_(train=True, weight=1), (3, 1, 2, 0)),
    "thoughts that the template has no form for": ("a.jsonl", with_(thinking="x") + NL + A, "the chatml template has no form for thoughts"),
    "tools, calls, pictures": ("a.jsonl", NL.join([with_(tools=[1]), with_(tool_calls=[1]), with_(images=["x"]), with_(tools=[], image=None)]), (4, 1, 3, 0)),
    "a placeholder of a picture": ("a.jsonl", with_(instruction="<image>\na") + NL + A, (2, 1, 1, 0)),
    "lists of rows in the list of rows": ("a.json", f"[[{A}, {A}], {A}]", (2, 1, 1, 0)),
    # conversations
    "two user turns": ("a.jsonl", chat(("user", "a"), ("user", "b"), ("assistant", "c")) + NL + A, (2, 1, 1, 0)),
    "no reply": ("a.jsonl", chat(("user", "a")) + NL + A, (2, 1, 1, 0)),
    "wrong role": ("a.jsonl", chat(("narrator", "a"), ("assistant", "b")) + NL + A, (2, 1, 1, 0)),
    "roles of another name": ("a.jsonl", chat(("Developer", "s"), ("USER", "a"), ("model", "b"), ("Human", "a"), ("bot", "b")), (1, 1, 0, 0)),
    "a system key beside an equal system turn": ("a.jsonl", chat(("system", "s"), ("user", "a"), ("assistant", "b"))[:-1] + ', "system": "s"}', (1, 1, 0, 0)),
    "a system key beside another system turn": ("a.jsonl", chat(("system", "s"), ("user", "a"), ("assistant", "b"))[:-1] + ', "system_prompt": "t"}' + NL + A, (2, 1, 1, 0)),
    "messages as text": ("a.jsonl", json.dumps({"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])}), (1, 1, 0, 0)),
    "messages as other text": ("a.jsonl", json.dumps({"messages": "[{'role': 'user'}]"}) + NL + A, (2, 1, 1, 0)),
    "a part that is not text": ("a.jsonl", chat(("user", [{"type": "image", "image": "x"}]), ("assistant", "b")) + NL + A, (2, 1, 1, 0)),
    "role null": ("a.jsonl", chat((None, "a"), ("assistant", "b")) + NL + A, (2, 1, 1, 0)),  # type: ignore[arg-type]
    "tool turn": ("a.jsonl", chat(("user", "a"), ("tool", "x"), ("assistant", "b")) + NL + A, (2, 1, 1, 0)),
    "no messages": ("a.jsonl", '{"messages": []}' + NL + A, (2, 1, 1, 0)),
    "messages null": ("a.jsonl", '{"messages": null}' + NL + A, (2, 1, 1, 0)),
    "a turn after the last reply": ("a.jsonl", chat(("user", "a"), ("assistant", "b"), ("user", "c")), (1, 1, 0, 1)),
    "text parts": ("a.jsonl", chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), (1, 1, 0, 0)),
    "sharegpt": ("a.json", f"[{chat(('human', 'a'), ('gpt', 'b'), key='conversations', names=('from', 'value'))}]", (1, 1, 0, 0)),
    "sharegpt, unknown speaker": ("a.jsonl", chat(("human", "a"), ("narrator", "b"), key="conversations", names=("from", "value")) + NL + A, (2, 1, 1, 0)),
    "prompt and completion": ("a.jsonl", '{"prompt": "a", "completion": "b"}', (1, 1, 0, 0)),
    "prompt and completion as messages": ("a.jsonl", json.dumps({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}), (1, 1, 0, 0)),
    "mixed formats": ("a.jsonl", A + NL + chat(("user", "a"), ("assistant", "b")) + NL + '{"prompt": "a", "completion": "b"}', (3, 3, 0, 0)),
    # tables
    "csv": ("a.csv", 'instruction,input,output\na,,b\n"c, d",,"e\nf"\n', (2, 2, 0, 0)),
    "csv with semicolons": ("a.csv", "instruction;output\na;b\n", (1, 1, 0, 0)),
    "csv, its delimiter in the first line": ("a.csv", "sep=;\r\ninstruction;output\r\na, b;c\r\n", (1, 1, 0, 0)),
    "csv of Excel under another name": ("a.txt", '"sep=,"\ninstruction,output\na;b,c\n', (1, 1, 0, 0)),
    "tsv": ("a.tsv", "instruction\toutput\na\tb\n", (1, 1, 0, 0)),
    "csv, too many cells": ("a.csv", "instruction,output\na,b\na,b,c\n", (2, 1, 1, 0)),
    "csv, a cell too few": ("a.csv", "instruction,output\na,b\na\n", (2, 1, 1, 0)),
    "csv, blank lines": ("a.csv", "instruction,output\n\na,b\n  \n", (1, 1, 0, 0)),
    "csv, a nul character": ("a.csv", "instruction,output\na,b\0c\n", (1, 1, 0, 1)),
    "csv, only carriage returns": ("a.csv", "instruction,output\ra,b\rc,d\r", (2, 2, 0, 0)),
    "csv, text after a closing quote": ("a.csv", 'instruction,output\na,"b" x\nc,d\n', (2, 1, 1, 0)),
    "csv, a quote never closed": ("a.csv", 'instruction,output\na,b\nc,"d\ne,f\n', "a.csv:3: a quote that opens here is not closed at the end of its cell"),
    "csv, a quote closed rows later": ("a.csv", 'instruction,output\na,"b\nc,d\ne,"f"\n', "a.csv:2: a quote that opens here is not closed at the end of its cell"),
    "csv under another name": ("a.txt", "instruction,output\na,b\n", (1, 1, 0, 0)),
    "jsonl under a table's name": ("a.csv", A + NL + A, (2, 2, 0, 0)),
    "an array under a table's name": ("a.tsv", f"[{A}, {A}]", (2, 2, 0, 0)),
    "csv, a list as text": ("a.csv", 'instruction,output\na,"[1, 2]"\n', (1, 1, 0, 0)),
    "csv, only a header": ("a.csv", "instruction,output\n", "no row can be used (0 read)"),
    "csv, a column twice": ("a.csv", "instruction,output,output\na,b,c\n", "has two columns of the same name"),
    "csv, misspelt header": ("a.csv", "instrution,output\na,b\n", "did you mean 'instruction'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_file_has_the_expected_outcome(
    name: str, luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    file, content, outcome = CASES[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    argv = ("check", "--model", model_dir("llama"), "--data", path)
    done = luthier(*argv, "--json")
    report = json.loads(done.out)
    rows = report["rows"]
    assert "Traceback" not in done.err
    assert rows["kept"] + rows["dropped"] == rows["read"]
    named = {(p["file"], p["row"]) for p in report["problems"] if p["row"] is not None}
    assert all(f == str(path) and r >= 1 for f, r in named)
    if isinstance(outcome, str):
        assert done.code == 2
        assert outcome in done.err
        assert done.err.splitlines()[-1].startswith("  fix: ")
    else:
        assert done.code == 0, done.err
        assert (rows["read"], rows["kept"], rows["dropped"], rows["changed"]) == outcome
        assert len(named) == outcome[2] + outcome[3]
    assert luthier(*argv, "--show", "2").code == done.code  # rows can also be printed


def test_no_case_was_lost() -> None:
    assert len(CASES) >= 60


def test_parquet_rows_are_read(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    done = luthier("check", "--model", model_dir("llama"), "--data", tmp_path / "a.parquet", "--json")
    assert json.loads(done.out)["rows"] == {"read": 2, "kept": 1, "dropped": 1, "changed": 0}


def test_patterns_are_expanded_and_a_file_is_read_once(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(A + NL + "{bad" + NL)
    argv = ("check", "--model", model_dir("llama"), "--data", tmp_path / "*.jsonl")
    assert json.loads(luthier(*argv, "--json").out)["rows"]["read"] == 4
    twice = json.loads(luthier(*argv, "--data", tmp_path / "a.jsonl", "--json").out)
    assert twice["rows"] == {"read": 4, "kept": 2, "dropped": 2, "changed": 0}
    assert twice["notes"][0]["note"] == "a file that is listed more than once is read once"
    none = luthier("check", "--model", model_dir("llama"), "--data", tmp_path / "*.csv")
    assert "no file matches" in none.err


def test_rows_can_be_deduplicated_and_keys_renamed(
    luthier: Callable[..., Result], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(A + NL + A + NL + '{"q": "a", "output": "c"}')
    argv = ("check", "--model", model_dir("llama"), "--data", path, "--json", "--rename", "q=instruction")
    assert json.loads(luthier(*argv).out)["rows"]["kept"] == 3
    report = json.loads(luthier(*argv, "--set", "data.dedupe=true").out)
    assert report["rows"] == {"read": 3, "kept": 2, "dropped": 1, "changed": 0}
    assert report["problems"][0]["reason"] == f"is the same as {path}:1"
    assert luthier(*argv, "--rename", "x").code == 2
    unused = luthier(*argv, "--rename", "question=instruction")
    assert unused.code == 2
    assert "data.rename would be ignored: no row has the key 'question'" in unused.err
