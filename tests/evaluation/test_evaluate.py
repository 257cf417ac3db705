"""Evaluation: the split never leaks, base and tuned side by side, and time budgets are kept and said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import luthier as library
from luthier import personas
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training.forward import prove_segments
from luthier.verbs.check import inspect
from tests.conftest import ARCHITECTURES, Result, make_model
from tests.conftest import teahouse as config
from tests.helpers.rows import examples, padded_losses

Run = Callable[..., Result]
FEW = ("--samples", 3, "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "run"
    library.train(config(model, path, {"eval_fraction": 0.2}))
    return path


def test_equal_prompts_are_on_one_side(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{i % 50}", "output": f"a{i}"} for i in range(200)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    found = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    held = {c.messages[0].content for c in found.rows.account.conversations}
    assert 5 <= len(held) <= 25
    assert len(found.rows.held_out) == 4 * len(held)
    assert len(found.rows.train) + len(found.rows.held_out) == 200
    assert found.rows.account.report.rows()["kept"] == 200
    again = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    assert [c.messages for c in again.rows.account.conversations] == [
        c.messages for c in found.rows.account.conversations
    ]
    wider = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.5}))
    assert held < {c.messages[0].content for c in wider.rows.account.conversations}


def test_a_conversation_that_goes_on_is_on_the_side_of_its_start(model: Path, tmp_path: Path) -> None:
    """Else the reply to a held-out question would be trained inside a longer row."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = []
    for i in range(60):
        opening = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]
        lines += [{"messages": opening}, {"messages": [*opening, *turns]}]
    rows.write_text("\n".join(map(json.dumps, lines)))
    found = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    held = [c.messages[0].content for c in found.rows.account.conversations]
    assert 10 < len(held) < 110
    assert all(held.count(question) == 2 for question in held)


def test_held_out_rows_whose_prompts_are_trained_are_noted(model: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    line = personas.TEAHOUSE.read_text(encoding="utf-8").splitlines()[0]
    held.write_text(
        f'{line}\n{json.dumps({**json.loads(line), "output": "b"})}\n{{"instruction": "q", "output": "a"}}\n'
    )
    notes = inspect(config(model, tmp_path, {"eval": held})).rows.account.report.notes
    assert notes["the prompt of a row in data.eval is trained too"] == 2
    assert not inspect(config(model, tmp_path, {"eval": personas.HELD_OUT})).rows.account.report.notes


def test_settings_that_would_be_ignored_are_errors(model: Path, tmp_path: Path) -> None:
    both = inspect(config(model, tmp_path, {"eval_fraction": 0.2, "eval": personas.HELD_OUT}))
    assert both.error
    assert "data.eval_fraction would be ignored" in both.error.message


def test_the_end_of_a_run_compares_both(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["held_out"]["tuned"]["loss"] < summary["held_out"]["base"]["loss"]
    assert summary["held_out"]["tuned"] == result["tuned"]
    assert result["samples"][0].keys() == {"prompt", "reference", "base", "tuned", "stopped"}
    rows = [json.loads(x) for x in (run / "held-out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == result["tuned"]["rows"]


def test_eval_prints_both_sides(run: Path, luthier: Run) -> None:
    found = json.loads(luthier("eval", run, "--json", *FEW).out)
    assert found["data"] == str(run / "held-out.jsonl")
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert 0 <= found["tuned"]["stop_rate"] <= 1
    assert found["tuned"]["perplexity"] == pytest.approx(math.exp(found["tuned"]["loss"]))
    stored = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert found["tuned"]["loss"] == pytest.approx(stored["tuned"]["loss"], rel=1e-5)
    table = luthier("eval", run, *FEW)
    assert "perplexity" in table.out
    other = json.loads(luthier("eval", run, "--data", personas.HELD_OUT, "--json", *FEW).out)
    assert other["data"] == str(personas.HELD_OUT)
    assert other["base"]["rows"] == 24


def test_the_losses_are_those_of_stock_transformers(run: Path, model: Path, tokenizer: Tokenizer) -> None:
    found = library.eval(run, [personas.TEAHOUSE], samples=0)
    rows = list(inspect(config(model, run, {})).rows.train)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = float(padded_losses(stock, rows).double().mean())
    assert found.base.held_out.loss == pytest.approx(expected, rel=1e-5)
    assert found.tuned.held_out.loss < found.base.held_out.loss


def test_no_time_is_said(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = config(model, tmp_path / "run", {"eval_fraction": 0.3}, eval_time_ratio=1e-9, max_steps=2)
    library.train(made, say=said.append)
    assert any("evaluation stopped after its time" in s and "luthier eval" in s for s in said)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert result["tuned"]["complete"] is False
    assert result["tuned"]["stop_rate"] is None


def test_no_time_for_replies_to_training_questions_is_said(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    library.train(config(model, tmp_path / "run", {}, eval_time_ratio=1e-9, max_steps=2), say=said.append)
    assert any("replies for the report stopped after their time (0.0 s), 0 of 4 written" in s for s in said)


def test_the_rows_of_eval_are_always_json(run: Path, luthier: Run, tmp_path: Path) -> None:
    """``data`` names a file of alpaca or messages JSON, whatever the rows came in."""
    row = {"instruction": "你是谁？", "output": "客官请坐。"}
    plain = json.dumps(row, ensure_ascii=False)
    cases = {
        "a.csv": "instruction,output\n你是谁？,客官请坐。\n".encode(),
        "a.jsonl": plain.encode("gb18030"),
        "b.jsonl": (plain + "\n{broken\n").encode(),
        "c.jsonl": json.dumps({"prompt": "你是谁？", "completion": "客官请坐。"}).encode(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        found = json.loads(luthier("eval", run, "--data", tmp_path / name, "--json", "--samples", 0).out)
        (line,) = Path(found["data"]).read_text(encoding="utf-8").splitlines()
        assert [m["content"] for m in json.loads(line)["messages"]] == list(row.values())
    (tmp_path / "d.json").write_text(f"[{plain}]", encoding="utf-8")
    found = json.loads(luthier("eval", run, "--data", tmp_path / "d.json", "--json", "--samples", 0).out)
    assert found["data"] == str(tmp_path / "d.json")


def test_nothing_held_out_says_what_to_do(model: Path, tmp_path: Path) -> None:
    library.train(config(model, tmp_path / "run", {}, max_steps=1))
    with pytest.raises(ConfigError, match="no held-out rows") as e:
        library.eval(tmp_path / "run")
    assert "--data FILE" in e.value.fix
    with pytest.raises(ConfigError, match="no adapter"):
        library.eval(model, [personas.HELD_OUT])


def test_a_checkpoint_can_be_talked_to(run: Path, luthier: Run) -> None:
    last = json.loads(luthier("chat", run, "--checkpoint", 30, "--prompt", "你是谁？", "--json").out)
    whole = json.loads(luthier("chat", run, "--prompt", "你是谁？", "--json").out)
    assert last["reply"] == whole["reply"]
    scored = [json.loads(luthier("eval", run, "--json", *FEW, *at).out)["tuned"] for at in ((), ("--checkpoint", 30))]
    assert scored[0]["loss"] == scored[1]["loss"]
    none = luthier("chat", run, "--checkpoint", 7, "--prompt", "a")
    assert none.code == 2
    assert "its checkpoints are: 30" in none.err
    both = luthier("chat", "--model", run, "--adapter", run / "adapter", "--checkpoint", 30, "--prompt", "a")
    assert both.code == 2
    assert "is a step of a run's, not of --model" in both.err


def test_a_stock_peft_directory_is_read(model: Path, tmp_path: Path, luthier: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = get_peft_model(base, PeftConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate_proj", "absent"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "peft")
    ours = library.chat(model=model, adapter=tmp_path / "peft").generator.model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert float((ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max()) < 1e-5
    done = luthier(
        "eval", "--model", model, "--adapter", tmp_path / "peft", "--data", personas.HELD_OUT, "--json", *FEW
    )
    found = json.loads(done.out)
    assert found["base"]["loss"] != found["tuned"]["loss"]
    alone = luthier("chat", tmp_path / "peft", "--prompt", "a")
    assert alone.code == 2
    assert "--model BASE --adapter" in alone.err
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora True"):
        library.chat(model=model, adapter=tmp_path / "peft")


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_segment_gate_lets_plain_attention_pass(arch: str, tokenizer: Tokenizer) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        prove_segments(make_model(arch).to(dtype), examples(tokenizer))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("lfm2", "carry state from one row"),
        ("gpt_oss", "differs from plain causal attention"),
        ("bloom", "attention cannot be replaced"),
        ("mamba", "carry state from one row"),
        ("stablelm", "a flat batch fails in it|cannot be replaced"),
    ],
)
def test_the_segment_gate_refuses_models_whose_rows_would_see_each_other(
    kind: str, why: str, tokenizer: Tokenizer
) -> None:
    sizes = {
        "lfm2": {"layer_types": ["conv", "full_attention"], "intermediate_size": 96, "num_key_value_heads": 2},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "num_key_value_heads": 2},
        "bloom": {"n_layer": 2, "n_head": 4},
        "mamba": {},
        "stablelm": {},
    }[kind]
    made = AutoConfig.for_model(
        kind, vocab_size=640, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 or "sinks" in str(p.shape):
                p.normal_(0, 0.1)
    with pytest.raises(ModelError, match=f"cannot be trained yet: .*({why})"):
        prove_segments(model, examples(tokenizer))
