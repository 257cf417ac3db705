"""A key that decides what is learnt is followed, or its row is dropped with a reason that names it: never ignored.

The rows that remain are compared by their token ids and loss masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.data.loader import DataReport
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.types import RowRef
from tests.conftest import Result
from tests.helpers.rows import Loaded, encode, encoder, load

Row = dict[str, Any]
Run = Callable[..., Result]
END = "<|im_end|>"
CALL = [{"type": "function", "function": {"name": "lamp", "arguments": "{}"}}]


def chat(user: Row | None = None, reply: Row | None = None, opening: Row | None = None, **row: Any) -> Row:
    """A row of messages with further keys on its turns and on itself."""
    first = [{"role": "system", "content": "S", **opening}] if opening is not None else []
    turns = [{"role": "user", "content": "a", **(user or {})}, {"role": "assistant", "content": "b", **(reply or {})}]
    return {"messages": [*first, *turns], **row}


def sharegpt(user: Row | None = None, reply: Row | None = None, opening: Row | None = None, **row: Any) -> Row:
    names = {"role": "from", "content": "value"}
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{names.get(k, k): v for k, v in turn.items()} for turn in chat(user, reply, opening)["messages"]]
    return {"conversations": [{**turn, "from": speakers.get(turn["from"], turn["from"])} for turn in turns], **row}


def alpaca(**row: Any) -> Row:
    return {"instruction": "a", "output": "b", **row}


def completion(**row: Any) -> Row:
    return {"prompt": "a", "completion": "b", **row}


FORMATS: dict[str, Callable[..., Row]] = {
    "messages": chat, "sharegpt": sharegpt, "alpaca": alpaca, "prompt_completion": completion,
}  # fmt: skip
CONVERSATIONS = ("messages", "sharegpt")
MARKS = ("label", "loss", "loss_scale", "loss_weight", "train", "trainable", "training", "weight")
CONTENTS: list[tuple[str, Any]] = [
    ("image", "a.png"), ("images", ["a.png"]), ("video", "a.mp4"), ("videos", ["a.mp4"]), ("audio", {"bytes": "x"}),
    ("audios", ["a.wav"]), ("rejected_response", "no"), ("chat_template_kwargs", {"enable_thinking": False}),
]  # fmt: skip
YES = (True, 1, 1.0, "true", "1", "1.0", None, "", " ", float("nan"))
EMPTY = (None, "", " ", [], {}, [None], {"bytes": None}, "[]", "null", False)


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: Row, **options: Any) -> Loaded:
    return load(write(tmp_path / "rows.jsonl", rows), **options)


def learnt(tokenizer: Tokenizer, rows: Loaded, **options: Any) -> list[tuple[list[int], list[bool]]]:
    """The token ids and the loss mask of every row that remains."""
    return [(e.ids.tolist(), e.trained.tolist()) for e in encode(encoder(tokenizer, **options), rows.conversations)]


def texts(tokenizer: Tokenizer, rows: Loaded, **options: Any) -> list[str]:
    """The trained text of every row that remains."""
    return [
        "".join(p for p, trained in zip(tokenizer.pieces(ids), mask, strict=True) if trained)
        for ids, mask in learnt(tokenizer, rows, **options)
    ]


def assert_dropped(tmp_path: Path, tokenizer: Tokenizer, plain: Row, row: Row, *parts: str) -> None:
    """The row between two plain ones is dropped for a reason with these parts; the others are trained as before."""
    rows = read(tmp_path, plain, row, plain)
    assert rows.report.rows() == {"read": 3, "kept": 2, "dropped": 1, "changed": 0}
    (problem,) = rows.report.problems
    assert problem.source.row == 2
    assert problem.fix
    for part in parts:
        assert part in problem.reason
    assert texts(tokenizer, rows) == [f"b{END}"] * 2


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("key", MARKS)
def test_a_mark_on_a_row_is_followed_or_drops_it(key: str, fmt: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make = FORMATS[fmt]
    for value in (False, 0, 0.0, "false", "0", "No"):
        assert_dropped(tmp_path, tokenizer, make(), make(**{key: value}), f"{key} is ", "is not to be trained")
    for value in (0.5, 2, "0.5", -1):
        assert_dropped(tmp_path, tokenizer, make(), make(**{key: value}), f"{key} is ", "have the weight 1")
    for value in ([1, 0], {"a": 1}, 10**400):
        assert_dropped(tmp_path, tokenizer, make(), make(**{key: value}), f"{key} must be true, false or a number")
    same = read(tmp_path, *(make(**{key: value}) for value in YES))
    assert (same.report.kept, same.report.problems, same.report.notes) == (len(YES), [], {})
    assert learnt(tokenizer, same) == learnt(tokenizer, read(tmp_path, make())) * len(YES)


def test_a_text_is_a_label_of_another_kind_and_no_other_mark(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = read(tmp_path, alpaca(label="cat"))
    assert (rows.report.kept, rows.report.notes) == (1, {"key 'label' is not used": 1})
    assert_dropped(tmp_path, tokenizer, alpaca(), alpaca(weight="high"), "weight must be", "got 'high'")


@pytest.mark.parametrize("fmt", CONVERSATIONS)
@pytest.mark.parametrize("key", MARKS)
def test_a_mark_on_a_turn_is_followed_or_drops_its_row(
    key: str, fmt: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    make, name = FORMATS[fmt], "conversations" if fmt == "sharegpt" else "messages"
    for value in (False, 0, "false"):
        reasons = (f"{name}[2].{key} is ", "no reply of the row is to be trained")
        assert_dropped(tmp_path, tokenizer, make(), make(reply={key: value}), *reasons)
    assert_dropped(tmp_path, tokenizer, make(), make(reply={key: 0.5}), f"{name}[2].{key} is 0.5")
    assert_dropped(tmp_path, tokenizer, make(), make(user={key: True}), f"{name}[1].{key} is true", "only replies")
    assert_dropped(tmp_path, tokenizer, make(), make(opening={key: 1}), f"{name}[1].{key} is 1", "only replies")
    agreeing = [
        make(reply={key: value}, user={key: other}, opening={key: other})
        for value, other in ((True, False), (1, 0), ("true", "false"), (None, None))
    ]
    same = read(tmp_path, *agreeing)
    assert (same.report.kept, same.report.problems, same.report.notes) == (4, [], {})
    assert learnt(tokenizer, same) == learnt(tokenizer, read(tmp_path, make(opening={}))) * 4


def test_a_reply_that_is_marked_as_not_trained_is_context(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def talk(first: int, last: int) -> Row:
        turns = chat(reply={"weight": first})["messages"] + chat(reply={"content": "d", "weight": last})["messages"]
        return {"messages": turns}

    rows = read(tmp_path, talk(0, 1), talk(1, 0), talk(0, 0), talk(1, 1))
    assert [(p.source.row, p.outcome, p.reason) for p in rows.report.problems] == [
        (2, "changed", "turns after the last reply were cut"),
        (3, "dropped", "no reply of the row is to be trained (messages[4].weight is 0)"),
    ]
    assert texts(tokenizer, rows) == [f"d{END}", f"b{END}", f"b{END}d{END}"]
    assert texts(tokenizer, rows, train_on="last_reply") == [f"d{END}", f"b{END}", f"d{END}"]
    every = learnt(tokenizer, rows)
    assert every[0][0] == every[2][0]  # the same tokens, with another loss mask


MISPLACED = [
    ("reasoning_content", "hm", CONVERSATIONS, "a thought belongs to a reply"),
    ("thinking", "hm", CONVERSATIONS, "a thought belongs to a reply"),
    *((key, CALL, tuple(FORMATS), "only replies call tools") for key in ("tool_calls", "function_call")),
]


@pytest.mark.parametrize(("key", "value", "formats", "why"), MISPLACED)
def test_a_part_of_a_reply_in_another_place_drops_the_row(
    key: str, value: Any, formats: Sequence[str], why: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for fmt in formats:
        make = FORMATS[fmt]
        assert_dropped(tmp_path, tokenizer, make(), make(**{key: value}), f"{key} is not empty", why)
        if fmt in CONVERSATIONS:
            assert_dropped(tmp_path, tokenizer, make(), make(user={key: value}), f"[1].{key} is not empty", why)
            assert_dropped(
                tmp_path, tokenizer, make(), make(user={"tools": CALL}), "[1].tools is not empty", "whole row"
            )
    for empty in EMPTY:
        assert read(tmp_path, *(FORMATS[fmt](**{key: empty}) for fmt in formats)).report.problems == []


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("key", "value"), CONTENTS)
def test_a_row_with_something_besides_text_is_dropped(
    key: str, value: Any, fmt: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    make = FORMATS[fmt]
    assert_dropped(tmp_path, tokenizer, make(), make(**{key: value}), f"{key} is not empty")
    same = read(tmp_path, *(make(**{key: empty}) for empty in EMPTY))
    assert (same.report.kept, same.report.problems, same.report.notes) == (len(EMPTY), [], {})
    assert texts(tokenizer, same) == [f"b{END}"] * len(EMPTY)
    if fmt in CONVERSATIONS:
        name = "conversations" if fmt == "sharegpt" else "messages"
        assert_dropped(tmp_path, tokenizer, make(), make(reply={key: value}), f"{name}[2].{key} is not empty")
        assert_dropped(tmp_path, tokenizer, make(), make(user={key: value}), f"{name}[1].{key} is not empty")
        assert read(tmp_path, *(make(reply={key: empty}) for empty in EMPTY)).report.problems == []


@pytest.mark.parametrize("make", [chat, sharegpt])
def test_parts_of_a_message_that_are_not_text_drop_the_row(
    make: Callable[..., Row], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    key = "value" if make is sharegpt else "content"
    word = {"type": "text", "text": "a"}
    for kind in ("image", "image_url", "video", "audio", "input_audio", "thinking", None):
        row = make(user={"content": [word, {"type": kind, str(kind): "x"}]})
        assert_dropped(tmp_path, tokenizer, make(), row, f"[1].{key}[2]", f"type {kind!r}")
    row = make(user={"content": [{**word, "image": "x.png"}]})
    assert_dropped(tmp_path, tokenizer, make(), row, f"[1].{key}[1].image is not empty")
    row = make(reply={"content": [{**word, "train": False}, word]})
    assert_dropped(tmp_path, tokenizer, make(), row, f"[2].{key}[1].train is false", "part of a text")
    parts = [{**word, "image": None}, {"type": "text", "text": None}, {"type": "text", "text": "c"}]
    rows = read(tmp_path, make(reply={"content": parts}))
    assert texts(tokenizer, rows) == [f"ac{END}"]


def test_a_placeholder_of_a_picture_drops_the_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for asked in ("<image>\na", "a\n<image>"):
        for row in (alpaca(instruction=asked), chat(user={"content": asked}), sharegpt(user={"content": asked})):
            assert_dropped(tmp_path, tokenizer, alpaca(), row, "the placeholder <image>")
    for placeholder in ("<image>", "<video>", "<audio>"):
        row = alpaca(instruction=f"a {placeholder} b", images=[])
        assert_dropped(tmp_path, tokenizer, alpaca(), row, f"the placeholder {placeholder}")
    rows = read(tmp_path, alpaca(instruction="What does <image> do in SVG?"), alpaca(instruction="<video> in HTML?"))
    assert rows.report.kept == 2


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_prompt_of_a_row_is_followed(key: str, fmt: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make = FORMATS[fmt]
    expected = learnt(tokenizer, read(tmp_path, chat(opening={})))
    rows = read(tmp_path, make(**{key: "S"}), system="other")
    assert (rows.report.problems, rows.report.notes) == ([], {})
    assert learnt(tokenizer, rows) == expected
    assert learnt(tokenizer, read(tmp_path, make(**{key: [{"type": "text", "text": "S"}]}))) == expected
    for empty in (None, ""):
        assert learnt(tokenizer, read(tmp_path, make(**{key: empty}))) == learnt(tokenizer, read(tmp_path, make()))
    if fmt in CONVERSATIONS:
        assert learnt(tokenizer, read(tmp_path, make(opening={}, **{key: "S\n"}))) == learnt(
            tokenizer, read(tmp_path, chat(opening={"content": "S\n"}))
        )
        row = make(opening={"content": "T"}, **{key: "S"})
        assert_dropped(tmp_path, tokenizer, make(), row, key, "[1] are different system prompts")
        other = read(tmp_path, row, rename={key: f"unused_{key}"})
        assert other.conversations[0].messages[0].content == "T"


@pytest.mark.parametrize("fmt", FORMATS)
def test_two_system_keys_must_agree(fmt: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make = FORMATS[fmt]
    row = make(system="S", system_prompt="T")
    assert_dropped(tmp_path, tokenizer, make(), row, "system and system_prompt are different system prompts")
    row["system_prompt"] = "S"
    assert learnt(tokenizer, read(tmp_path, row)) == learnt(tokenizer, read(tmp_path, chat(opening={})))


def test_an_unknown_key_with_the_value_null_is_not_noted(tmp_path: Path) -> None:
    rows = read(tmp_path, chat(source=None), chat(reply={"name": None}), chat(source="x", reply={"name": "y"}))
    assert rows.report.notes == {"key 'source' is not used": 1, "key 'name' is not used": 1}


ROWS = [
    *[alpaca(id=i) for i in range(6)],
    *[alpaca(label=False)] * 3,
    chat(reply={"weight": 0}),
    alpaca(output=5),
    {"messages": chat()["messages"] + chat(reply={"weight": 0})["messages"]},
]
LINES = (
    "dropped 3 rows, first {path}:7: label is false: the row is not to be trained",
    "dropped {path}:10: no reply of the row is to be trained (messages[2].weight is 0)",
    "changed {path}:12: turns after the last reply were cut",
    "changed {path}:11: output was a int and was converted to text",
    "note: key 'id' is not used (6 rows)",
)


def assert_printed(text: str, path: Path, lines: Sequence[str] = LINES) -> None:
    for line in lines:
        assert line.format(path=path) in text
    assert "--rename label=unused_label" in text


def test_train_and_check_print_what_became_of_the_rows(
    luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path, other = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "eval.jsonl", ROWS)
    argv = ("--model", model_dir("llama"), "--data", path, "--set", f"data.eval={other}")
    settings = ("--output-dir", tmp_path / "run", "--set", "train.max_steps=1", "--set", "train.eval_time_ratio=0")
    trained = luthier("train", *argv, *settings)
    assert trained.code == 0, trained.err
    assert "data: 12 rows read, 8 kept, 4 dropped, 2 changed" in trained.err
    assert "data.eval: 12 rows read, 8 kept, 4 dropped, 2 changed" in trained.err
    checked = luthier("check", *argv)
    assert "data.eval: 12 rows read, 8 kept, 4 dropped, 2 changed" in checked.out
    for text in (trained.err, checked.out):
        assert_printed(text, path)
        assert_printed(text, other)
    assert f"  {path}:10: dropped: no reply of the row is to be trained (messages[2].weight is 0)" in checked.out
    renamed = luthier("check", *argv, "--rename", "label=unused_label")
    assert "rows     12 read, 11 kept, 1 dropped" in renamed.out
    assert "note: key 'unused_label' is not used (3 rows)" in renamed.out


def test_eval_prints_what_became_of_the_rows(luthier: Run, teahouse_run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert_printed(luthier("eval", teahouse_run, "--data", path, "--json", "--samples", 0).err, path)


def test_reasons_that_differ_in_details_are_counted_together_and_few_lines_are_printed() -> None:
    report = DataReport(read=100)
    for i in range(1, 31):
        report.add(RowRef("f", i), f"truncated from {i} to 9 tokens", "changed")
    report.add(RowRef("f", 31), "not JSON (Expecting value, column 3)", "dropped")
    report.add(RowRef("f", 32), "not JSON (Extra data, column 9)", "dropped")
    report.add(RowRef("f", 33), "output was a int", "changed")
    report.add(RowRef("f", 33), "output is empty", "dropped")
    report.add(RowRef("f", 34), "messages[1].content was a int", "changed")
    report.add(RowRef("f", 34), "messages[3].content was a int", "changed")
    assert report.lines() == [
        "dropped 2 rows, first f:31: not JSON (Expecting value, column 3)",
        "dropped f:33: output is empty",
        "changed 30 rows, first f:1: truncated from 1 to 9 tokens",
        "changed f:34: messages[1].content was a int",
    ]
    report.notes.update({f"key '{c}' is not used": 2 for c in "abcdefg"})
    assert report.lines()[4:] == [
        *(f"note: key '{c}' is not used (2 rows)" for c in "abcd"),
        "... and 3 more: luthier check --json lists every row",
    ]
