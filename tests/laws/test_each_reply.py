"""Law: replies with examples of their own are trained as chat prompts them, and their common turns are computed once.

Tokens computed for a conversation = size of the prefix tree of its rendered rows; the loss is that of the rows apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier import config as configs
from luthier.batching.collate import collate, to_device
from luthier.batching.plan import Packing, Plan
from luthier.config import TrainConfig
from luthier.data.loader import DataReport
from luthier.encoding.encoder import Encoder
from luthier.encoding.rows import encode_rows
from luthier.encoding.store import ExampleStore, row_starts
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import OwnTemplate, pick, stop_ids
from luthier.training import memory_model
from luthier.training.forward import loss_sum, segment_attention
from luthier.training.memory_model import RowLengths
from luthier.types import Conversation, Example, Message, RowRef
from luthier.verbs.check import inspect
from luthier.verbs.train import train
from tests.conftest import make_model, teahouse
from tests.helpers.rows import encode
from tests.helpers.trl_templates import with_markers

# as Qwen3's template: the thought of the last reply is written, those of earlier replies are removed
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(turns: int, row: int = 1) -> Conversation:
    """A conversation whose turns are long enough to be shared."""
    messages = [Message("system", f"You keep lighthouse number {row} and answer in the third person.")]
    for i in range(turns):
        messages.append(Message("user", f"What did you write in the logbook on day {i} of the storm?"))
        messages.append(Message("assistant", f"On day {i} the lamp burnt all night.", thought=f"Day {i}: the lamp."))
    return Conversation(tuple(messages), RowRef("talks", row))


@pytest.fixture(scope="module")
def thinking() -> Tokenizer:
    return with_markers(THINKING)


def encoder(tokenizer: Tokenizer, **options: Any) -> Encoder:
    template = pick("auto", OwnTemplate(tokenizer.render, THINKING), ("<|im_end|>",))
    return Encoder(template, tokenizer, stop_ids(template, tokenizer), options.pop("max_length", 4096), **options)


def tree_size(examples: Sequence[Example]) -> int:
    """Count the different prefixes of all rows; the last token of a row is only a target."""
    return len({row[:size].tobytes() for row in (e.ids[:-1] for e in examples) for size in range(1, len(row) + 1)})


@pytest.mark.parametrize("train_on", ["all_replies", "each_reply"])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_every_reply_follows_the_prompt_of_chat_and_common_turns_are_computed_once(
    turns: int, train_on: Any, thinking: Tokenizer
) -> None:
    e, conversation = encoder(thinking, train_on=train_on), talk(turns)
    examples = encode(e, [conversation])
    assert len(examples) == turns
    replies = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    for example, i in zip(examples, replies, strict=True):
        start = int(np.flatnonzero(example.trained)[0])
        prompt = thinking.encode_batch([e.template.prompt(conversation.messages[:i])])[0].ids
        assert (example.ids[:start].tolist(), example.trained[start:].all()) == (prompt, True)
        thought, content = conversation.messages[i].thought, conversation.messages[i].content
        assert thinking.text(example.ids[start:]) == f"<think>\n{thought}\n</think>\n\n{content}<|im_end|>"
    assert len(collate(examples, share=True).input_ids) == tree_size(examples)
    if turns > 1:
        assert tree_size(examples) < 0.75 * sum(map(len, examples))


def test_the_tokens_of_a_whole_run_are_the_sizes_of_the_prefix_trees(thinking: Tokenizer) -> None:
    """Micro-batches keep the examples of a conversation together, whichever step they belong to."""
    store = ExampleStore(encode(encoder(thinking), [talk(1 + i % 4, i) for i in range(12)]))
    starts = row_starts(store)
    assert np.diff(starts).tolist() == [1 + i % 4 for i in range(12)]
    config = TrainConfig(num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    plan, packing = Plan.of(len(starts) - 1, config), Packing.of(config.model_copy(update={"micro_batch_tokens": 0}))
    expected = sum(
        tree_size([e for row in rows for e in store[starts[row] : starts[row + 1]]])
        for step in range(plan.steps)
        for rows in plan.step(step)
    )
    batches = [b for _, step in plan.batches(store, packing=packing) for b in step]
    assert plan.steps == 3
    assert sum(len(b.input_ids) for b in batches) == expected
    assert sum(b.supervised for b in batches) == sum(store.supervised())


@pytest.mark.parametrize("budget", [400, 1000, 2048])
def test_micro_batches_of_a_token_budget_do_not_cut_a_conversation(budget: int, thinking: Tokenizer) -> None:
    """Unless it is larger than the budget; so the tokens of a run are those of its conversations' trees."""
    store = ExampleStore(encode(encoder(thinking), [talk(1 + i % 4, i) for i in range(12)]))
    starts = row_starts(store)
    trees = [tree_size(store[a:b]) for a, b in pairwise(starts)]
    assert max(trees) <= 400
    plan = Plan.of(len(starts) - 1, TrainConfig(num_train_epochs=1, per_device_train_batch_size=6))
    batches = [b for _, step in plan.batches(store, packing=Packing(budget, share=True)) for b in step]
    assert sum(len(b.input_ids) for b in batches) <= sum(trees)
    assert max(len(b.input_ids) for b in batches) <= budget
    small = [b for _, step in plan.batches(store, packing=Packing(100, share=True)) for b in step]
    assert sum(b.supervised for b in small) == sum(store.supervised())


def test_the_loss_is_that_of_the_rows_apart(thinking: Tokenizer) -> None:
    examples = encode(encoder(thinking), [talk(4)])
    model = make_model("llama", vocab_size=len(thinking.hf) + 8)
    with torch.no_grad(), segment_attention(model, "auto"):
        together = float(loss_sum(model, to_device(collate(examples, share=True), "cpu")))
        apart = sum(float(loss_sum(model, to_device(collate([e]), "cpu"))) for e in examples)
    assert together == pytest.approx(apart, rel=1e-5)


def test_an_explicit_example_per_reply_trains_the_same_replies(tokenizer: Tokenizer) -> None:
    """With a template that does not rewrite earlier turns, as a law of the setting."""
    from tests.helpers import rows

    conversations = rows.conversations()
    together = encode(rows.encoder(tokenizer), conversations)
    each = encode(rows.encoder(tokenizer, train_on="each_reply"), conversations)
    assert sum(e.supervised for e in each) == sum(e.supervised for e in together)
    last = [e for e, after in zip(each, [*each[1:], None], strict=True) if after is None or after.shared < 0]
    assert [e.ids.tolist() for e in last] == [e.ids.tolist() for e in together]


@pytest.mark.parametrize("form", ["field", "text"])
def test_thoughts_are_kept_left_out_or_emptied(form: str, thinking: Tokenizer, tokenizer: Tokenizer) -> None:
    """With a template that writes an empty thought by itself, and with one that knows no thoughts."""
    from tests.helpers import rows

    thought, none = "<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"
    reply = Message("assistant", "b", thought="hm") if form == "field" else Message("assistant", f"{thought}b")
    conversation = Conversation((Message("user", "a"), reply), RowRef("f", 1))
    expected = {"keep": f"{thought}b<|im_end|>", "drop": f"{none}b<|im_end|>", "empty": f"{none}b<|im_end|>"}
    for choice, text in expected.items():
        (example,) = encode(encoder(thinking, thinking=choice), [conversation])
        assert thinking.text(example.ids[example.trained]) == text
    plain = {**expected, "drop": "b<|im_end|>"}
    for choice, text in plain.items():
        report = DataReport(read=1)
        examples = encode(rows.encoder(tokenizer, thinking=choice), [conversation], report)
        if choice == "keep" and form == "field":
            assert examples == [] and "data.thinking=drop" in report.unrendered[0].fix
            continue
        (example,) = examples
        assert tokenizer.text(example.ids[example.trained]) == text


def test_replies_that_do_not_fit_are_cut_and_the_others_stay(thinking: Tokenizer) -> None:
    lengths = [len(e) for e in encode(encoder(thinking), [talk(4)])]
    report = DataReport(read=1)
    examples = encode(encoder(thinking, max_length=lengths[1]), [talk(4)], report)
    assert [len(e) for e in examples][:2] == lengths[:2] and len(examples) < 4
    assert (report.kept, report.changed) == (1, 1)
    for too_long, outcome in (("drop", "dropped"), ("error", "refused")):
        report = DataReport(read=1)
        assert encode(encoder(thinking, max_length=lengths[1], too_long=too_long), [talk(4)], report) == []
        assert [p.outcome for p in report.problems] == [outcome]


def test_a_run_counts_conversations_and_its_memory_is_estimated_for_their_examples(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "talks.jsonl"
    turns = [{"role": m.role, "content": m.content} for m in talk(3).messages]
    rows.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(8)), encoding="utf-8")
    data = {"train": rows, "train_on": "each_reply", "eval_fraction": 0.0}
    config = teahouse(model_dir("llama"), tmp_path / "run", data, max_steps=None, num_train_epochs=1.0)
    config = configs.build(config.model_dump(mode="json"), settings=["train.eval_time_ratio=0"])
    checked = inspect(config)
    lengths = RowLengths.of(checked.rows.train)
    assert (len(lengths.lengths), [len(r) for r in lengths.rows()]) == (24, [3] * 8)
    summary = train(config)
    assert (summary["steps"], summary["rows"]["kept"]) == (1, 8)  # 16 rows per step


def test_a_conversation_and_its_continuation_are_on_the_same_side(thinking: Tokenizer, tmp_path: Path) -> None:
    """Held-out rows are chosen by the first question, however many examples a row has, and are whole conversations."""
    path = tmp_path / "talks.jsonl"
    with path.open("w", encoding="utf-8") as f:
        for row in range(60):
            for turns in (1, 2):
                messages = [{"role": m.role, "content": m.content} for m in talk(turns, row).messages]
                f.write(json.dumps({"messages": messages}) + "\n")
    for train_on in ("all_replies", "each_reply"):
        data = configs.build({"model": {"path": "m"}, "data": {"train": path, "eval_fraction": 0.3}}).data
        encoded = encode_rows(data, 42, encoder(thinking, train_on=train_on))
        held_out = encoded.report.conversations
        assert len(held_out) > 10 and all(m.trained for c in held_out for m in c.messages)
        sides = {c.messages[0].content for c in held_out}
        assert len(held_out) == 2 * len(sides)


def test_shared_turns_are_not_counted_twice_in_estimates(thinking: Tokenizer) -> None:
    store = ExampleStore(encode(encoder(thinking), [talk(6, i) for i in range(8)]))
    lengths = RowLengths.of(store)
    trees = sum(tree_size(store[r.start : r.stop]) for r in lengths.rows())
    assert abs(int(lengths.own(share=True).sum()) / trees - 1) < 0.1 < abs(sum(lengths.lengths) / trees - 1)
    config = TrainConfig(num_train_epochs=1, per_device_train_batch_size=1, micro_batch_tokens=0)
    heaviest = memory_model._heaviest(lengths, config)
    real = max(tree_size(store[r.start : r.stop]) for r in lengths.rows())
    assert abs(len(collate(heaviest, share=True).input_ids) / real - 1) < 0.05


def test_the_store_keeps_which_examples_belong_together(thinking: Tokenizer, tmp_path: Path) -> None:
    """Also without the ids, and in ``encode_rows``, which reads files."""
    examples = encode(encoder(thinking), [talk(3), talk(1, 2)])
    assert [e.shared >= 0 for e in ExampleStore(examples)] == [False, True, True, False]
    path = tmp_path / "talks.jsonl"
    turns = [{"role": m.role, "content": m.content, "reasoning_content": m.thought} for m in talk(3).messages]
    turns = [{k: v for k, v in turn.items() if v} for turn in turns]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    data = configs.build({"model": {"path": "m"}, "data": {"train": path}}).data
    counted = encode_rows(data, 42, encoder(thinking), keep=False)
    assert counted.report.error is None
    assert counted.train.row_starts().tolist() == [0, 3]
    assert counted.report.data_report.notes == {
        "trained with one example per reply, since the chat template writes earlier turns in another form": 1
    }
