"""Evaluation: no leaks between splits, base and tuned model compared, time limits observed and reported."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import luthier as library
from luthier import personas
from luthier.config import ModelConfig, TrainConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.evaluation import scoring
from luthier.models.directory import read_config
from luthier.models.loader import open_base
from luthier.models.native_model import in_fp32
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.training import loop
from luthier.training.forward import verify_segments
from luthier.types import Example
from luthier.verbs.check import inspect
from tests.conftest import ARCHITECTURES, Result, make_model
from tests.conftest import teahouse as config
from tests.helpers.rows import examples, padded_losses, with_adapter

Run = Callable[..., Result]
FEW = ("--samples", 3, "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


def test_rows_with_equal_prompts_are_in_the_same_split(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{i % 50}", "output": f"a{i}"} for i in range(200)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    first = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    prompts = {c.messages[0].content for c in first.rows.report.conversations}
    assert 5 <= len(prompts) <= 25
    assert len(first.rows.held_out) == 4 * len(prompts)
    assert len(first.rows.train) + len(first.rows.held_out) == 200
    assert first.rows.report.data_report.rows()["kept"] == 200
    again = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    assert [c.messages for c in again.rows.report.conversations] == [
        c.messages for c in first.rows.report.conversations
    ]
    wider = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.5}))
    assert prompts < {c.messages[0].content for c in wider.rows.report.conversations}


def test_a_longer_conversation_is_in_the_split_of_its_first_question(model: Path, tmp_path: Path) -> None:
    """Otherwise the reply to a held-out question would be trained as part of a longer row."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = []
    for i in range(60):
        opening = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]
        lines += [{"messages": opening}, {"messages": [*opening, *turns]}]
    rows.write_text("\n".join(map(json.dumps, lines)))
    inspection = inspect(config(model, tmp_path, {"train": rows, "eval_fraction": 0.3}))
    questions = [c.messages[0].content for c in inspection.rows.report.conversations]
    assert 10 < len(questions) < 110
    assert all(questions.count(question) == 2 for question in questions)


def test_held_out_rows_with_trained_prompts_are_reported(model: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    line = personas.TEAHOUSE.read_text(encoding="utf-8").splitlines()[0]
    held.write_text(
        f'{line}\n{json.dumps({**json.loads(line), "output": "b"})}\n{{"instruction": "q", "output": "a"}}\n'
    )
    notes = inspect(config(model, tmp_path, {"eval": held})).rows.report.data_report.notes
    assert notes["the prompt of a row in data.eval is also trained on"] == 2
    assert not inspect(config(model, tmp_path, {"eval": personas.HELD_OUT})).rows.report.data_report.notes


def test_a_run_ends_with_a_comparison_of_both_models(teahouse_run: Path) -> None:
    summary = json.loads((teahouse_run / "summary.json").read_text())
    result = json.loads((teahouse_run / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["held_out"]["tuned"]["loss"] < summary["held_out"]["base"]["loss"]
    assert summary["held_out"]["tuned"] == result["tuned"]
    assert result["samples"][0].keys() == {"prompt", "reference", "base", "tuned", "stopped"}
    rows = [json.loads(x) for x in (teahouse_run / "held-out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == result["tuned"]["rows"]


def test_eval_prints_the_scores_of_both_models(teahouse_run: Path, luthier: Run) -> None:
    scores = json.loads(luthier("eval", teahouse_run, "--json", *FEW).out)
    assert scores["data"] == str(teahouse_run / "held-out.jsonl")
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    assert 0 <= scores["tuned"]["stop_rate"] <= 1
    assert scores["tuned"]["perplexity"] == pytest.approx(math.exp(scores["tuned"]["loss"]))
    stored = json.loads((teahouse_run / "evaluation.json").read_text(encoding="utf-8"))
    assert scores["tuned"]["loss"] == pytest.approx(stored["tuned"]["loss"], rel=1e-5)
    table = luthier("eval", teahouse_run, *FEW)
    assert "perplexity" in table.out
    other = json.loads(luthier("eval", teahouse_run, "--data", personas.HELD_OUT, "--json", *FEW).out)
    assert other["data"] == str(personas.HELD_OUT)
    assert other["base"]["rows"] == 24


def test_the_losses_equal_those_of_stock_transformers(teahouse_run: Path, model: Path, tokenizer: Tokenizer) -> None:
    comparison = library.eval(teahouse_run, [personas.TEAHOUSE], samples=0)
    rows = list(inspect(config(model, teahouse_run, {})).rows.train)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = float(padded_losses(stock, rows).double().mean())
    assert comparison.base.held_out.loss == pytest.approx(expected, rel=1e-5)
    assert comparison.tuned.held_out.loss < comparison.base.held_out.loss


def test_reaching_the_time_limit_shortens_the_replies_only(model: Path, tmp_path: Path) -> None:
    """The held-out loss never depends on the time: whatever the limit, it covers the same rows."""
    messages: list[str] = []
    losses = []
    for name, ratio in (("short", 1e-9), ("long", 10)):
        data = {"eval_fraction": 0.3}
        settings = config(model, tmp_path / name, data, eval_time_ratio=ratio, max_steps=2, eval_rows=5)
        losses.append(library.train(settings, log=messages.append)["held_out"])
    assert any("sample replies stopped at their time limit" in m and "luthier eval" in m for m in messages)
    result = json.loads((tmp_path / "short" / "evaluation.json").read_text(encoding="utf-8"))
    assert result["tuned"]["complete"] is False
    assert result["tuned"]["stop_rate"] is None
    for which in ("base", "tuned"):
        short, long = (held_out[which] for held_out in losses)
        assert short["loss"] == long["loss"] and short["rows"] == long["rows"] == 5
    held_out = len((tmp_path / "short" / "held-out.jsonl").read_text(encoding="utf-8").splitlines())
    assert held_out > 5 and any(f"(5 of {held_out} rows)" in m for m in messages)


def test_the_scored_rows_are_spread_over_all_held_out_rows(tokenizer: Tokenizer) -> None:
    rows = examples(tokenizer, 10)
    assert scoring.spread(rows, 3) == [rows[0], rows[3], rows[6]]
    assert scoring.spread(rows, 0) == scoring.spread(rows, 10) == scoring.spread(rows, 99) == rows


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_held_out_losses_of_training_are_those_of_fp32(
    dtype: torch.dtype, fused: bool, tokenizer: Tokenizer
) -> None:
    """With the compiled layers and with the model's own, without dropout, for the tuned and the base model."""
    rows = examples(tokenizer, 40)
    model = make_model("llama").to(dtype)
    base = held_out_in_fp32(model, rows)
    layers = with_adapter(model, lora_dropout=0.5)
    losses: list[scoring.Losses] = []
    session = loop.Session(evaluate=lambda loss_of: losses.append(scoring.compare_losses(model, layers, rows, loss_of)))
    loop.train(model, layers, rows, TrainConfig(max_steps=2, learning_rate=1e-2, fused=fused), session)
    tuned = held_out_in_fp32(model, rows)
    tolerance = 1e-5 if dtype is torch.float32 or not fused else 0.002
    assert len(losses) == 1
    assert losses[0].tuned.loss == pytest.approx(tuned.loss, abs=tolerance)
    assert losses[0].base.loss == pytest.approx(base.loss, abs=tolerance)
    assert abs(tuned.loss - base.loss) > 0.05 and losses[0].tuned.rows == losses[0].base.rows == 40


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "starcoder2": {},  # norms with biases, in torch's own layer
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}


@pytest.mark.parametrize("arch", OTHERS)
def test_models_without_compiled_layers_are_scored_in_fp32(arch: str, tokenizer: Tokenizer) -> None:
    """Every parameter is widened, also those of norms and experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 640, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **{**sizes, **OTHERS[arch]})).bfloat16()
    rows = examples(tokenizer, 10)
    expected = held_out_in_fp32(model, rows).loss
    before = {name: p.clone() for name, p in model.named_parameters()}
    with in_fp32(model):
        assert scoring.held_out_loss(model, rows).loss == pytest.approx(expected, abs=1e-5)
    assert all(torch.equal(p, before[name]) and p.dtype is torch.bfloat16 for name, p in model.named_parameters())
    assert scoring.held_out_loss(model, rows).loss != pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_scored_in_fp32(bits: int, model_dir: Callable[[str], Path], tokenizer: Tokenizer) -> None:
    """Its embedding is a class of its own, whose output must be widened too."""
    settings = {"path": model_dir("qwen2"), "dtype": "bfloat16", f"load_in_{bits}bit": True}
    config = read_config(model_dir("qwen2"))
    opened = open_base(ModelConfig.model_validate(settings), torch.bfloat16, torch.device("cpu"), config)
    dtypes: list[torch.dtype] = []
    layer: Any = opened.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args, __: dtypes.append(args[0].dtype), with_kwargs=True)
    rows = examples(tokenizer, 4)
    with in_fp32(opened):
        scoring.held_out_loss(opened, rows)
    scoring.held_out_loss(opened, rows)
    hook.remove()
    assert dtypes == [torch.float32, torch.bfloat16]


def held_out_in_fp32(model: Any, rows: Sequence[Example]) -> scoring.HeldOut:
    """Compute the loss by a copy of the model that is stored in fp32."""
    return scoring.held_out_loss(copy.deepcopy(model).float(), rows)


def test_reaching_the_time_limit_for_replies_to_training_prompts_is_reported(model: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    library.train(config(model, tmp_path / "run", {}, eval_time_ratio=1e-9, max_steps=2), log=messages.append)
    assert any("replies for the report stopped at their time limit (0.0 s): 0 of 4 done" in m for m in messages)


def test_eval_names_a_json_file_with_the_scored_rows(teahouse_run: Path, luthier: Run, tmp_path: Path) -> None:
    """``data`` names a file of alpaca or messages JSON, whatever the format of the given file."""
    row = {"instruction": "你是谁？", "output": "客官请坐。"}
    plain = json.dumps(row, ensure_ascii=False)
    cases = {
        "a.csv": "instruction,output\n你是谁？,客官请坐。\n".encode(),
        "a.jsonl": plain.encode("gb18030"),
        "b.jsonl": (plain + "\n{broken\n").encode(),
        "c.jsonl": json.dumps({"prompt": "你是谁？", "completion": "客官请坐。"}).encode(),
        "e.jsonl": json.dumps({"question": "你是谁？", "answer": "客官请坐。"}).encode(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        result = json.loads(luthier("eval", teahouse_run, "--data", tmp_path / name, "--json", "--samples", 0).out)
        (line,) = Path(result["data"]).read_text(encoding="utf-8").splitlines()
        assert [m["content"] for m in json.loads(line)["messages"]] == list(row.values())
    (tmp_path / "d.json").write_text(f"[{plain}]", encoding="utf-8")
    result = json.loads(luthier("eval", teahouse_run, "--data", tmp_path / "d.json", "--json", "--samples", 0).out)
    assert result["data"] == str(tmp_path / "d.json")


def test_a_run_without_held_out_rows_is_an_error_with_a_fix(model: Path, tmp_path: Path) -> None:
    library.train(config(model, tmp_path / "run", {}, max_steps=1))
    with pytest.raises(ConfigError, match="no held-out rows") as e:
        library.eval(tmp_path / "run")
    assert "--data FILE" in e.value.fix
    with pytest.raises(ConfigError, match="no adapter"):
        library.eval(model, [personas.HELD_OUT])


def test_chat_and_eval_open_a_checkpoint(teahouse_run: Path, luthier: Run) -> None:
    checkpoint = json.loads(luthier("chat", teahouse_run, "--checkpoint", 30, "--prompt", "你是谁？", "--json").out)
    finished = json.loads(luthier("chat", teahouse_run, "--prompt", "你是谁？", "--json").out)
    assert checkpoint["reply"] == finished["reply"]
    scored = [
        json.loads(luthier("eval", teahouse_run, "--json", *FEW, *at).out)["tuned"] for at in ((), ("--checkpoint", 30))
    ]
    assert scored[0]["loss"] == scored[1]["loss"]
    none = luthier("chat", teahouse_run, "--checkpoint", 7, "--prompt", "a")
    assert none.code == 2
    assert "its checkpoints are: 30" in none.err
    both = luthier(
        "chat", "--model", teahouse_run, "--adapter", teahouse_run / "adapter", "--checkpoint", 30, "--prompt", "a"
    )
    assert both.code == 2
    assert "--checkpoint: needs a run, not --model and --adapter" in both.err


def test_a_stock_peft_directory_can_be_scored(model: Path, tmp_path: Path, luthier: Run) -> None:
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
    scores = json.loads(done.out)
    assert scores["base"]["loss"] != scores["tuned"]["loss"]
    without_base = luthier("chat", tmp_path / "peft", "--prompt", "a")
    assert without_base.code == 2
    assert "--model BASE --adapter" in without_base.err
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora True"):
        library.chat(model=model, adapter=tmp_path / "peft")


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_models_with_plain_attention_pass_the_segment_check(arch: str, tokenizer: Tokenizer) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        verify_segments(make_model(arch).to(dtype), examples(tokenizer))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("lfm2", "carry state from one row"),
        ("gpt_oss", "differs from causal self-attention"),
        ("bloom", "attention cannot be replaced"),
        ("mamba", "carry state from one row"),
        ("stablelm", "it fails on a flat batch|cannot be replaced"),
    ],
)
def test_models_whose_rows_would_see_each_other_are_refused(kind: str, why: str, tokenizer: Tokenizer) -> None:
    sizes = {
        "lfm2": {"layer_types": ["conv", "full_attention"], "intermediate_size": 96, "num_key_value_heads": 2},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "num_key_value_heads": 2},
        "bloom": {"n_layer": 2, "n_head": 4},
        "mamba": {},
        "stablelm": {},
    }[kind]
    model_config = AutoConfig.for_model(
        kind, vocab_size=640, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 or "sinks" in str(p.shape):
                p.normal_(0, 0.1)
    with pytest.raises(ModelError, match=f"cannot be trained yet: .*({why})"):
        verify_segments(model, examples(tokenizer))
