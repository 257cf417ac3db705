"""Train, chat, merge and reload every tutorial's model from its published files; refuse the tutorials' mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import luthier as library
from luthier import config as configs
from luthier.adapters.locate import locate_tuned
from luthier.adapters.original_names import Update
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.exporting import peft
from luthier.exporting.merge import write_merged
from luthier.models import directory
from luthier.models.checkpoint_reader import Shards, weight_files
from luthier.models.directory import family_of, read_config
from luthier.models.families import FAMILIES, Family, Modules, Rule
from luthier.models.loader import load_weights
from luthier.templates import NATIVE, Turns
from luthier.verbs.check import inspect
from tests.conftest import Result
from tests.helpers import published
from tests.helpers.definitions import baichuan2_logits, glm4_logits
from tests.helpers.published import PUBLISHED, read_tensors

Run = Callable[..., Result]
ROWS = [
    {"instruction": q, "input": "", "output": a}
    for q, a in (("你是谁？", "我是甄嬛。"), ("hello", "good day"), ("小姐", "嘘——"), ("a b", "c"), ("x", "yes, it is"))
]
IDS = torch.randint(0, 700, (1, 24), generator=torch.Generator().manual_seed(6))
DEFINITIONS: dict[str, Callable[..., Tensor]] = {"baichuan2": baichuan2_logits, "glm4": glm4_logits}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return path


def tune(model: Path, rows: Path, to: Path, **lora: Any) -> dict[str, Any]:
    train = {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    values = {"model": {"path": model, "dtype": "float32"}, "data": {"train": rows}, "train": train, "lora": lora}
    return library.train(configs.build({**values, "output_dir": to}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_train_chat_merge_reload(name: str, rows: Path, luthier: Run, tmp_path: Path) -> None:
    path, run, merged = PUBLISHED[name](tmp_path / "model"), tmp_path / "run", tmp_path / "merged"
    summary = tune(path, rows, run)
    assert summary["steps"] == 5
    assert summary["losses"][-1] < summary["losses"][0]
    tuned = library.chat(run)
    few = library.Sampling(max_new_tokens=4)  # longer replies would differ, as merged weights are rounded to bfloat16
    reply = tuned.send("你是谁？", few)
    done = luthier("merge", run, "--output-dir", merged)
    assert done.code == 0, done.err
    again = library.chat(merged)
    assert again.send("你是谁？", few).text == reply.text
    assert again.generator.chat_format.template.prompt(
        again.history[:1]
    ) == tuned.generator.chat_format.template.prompt(tuned.history[:1])
    assert set(tuned.generator.chat_format.stop_ids) <= set(again.generator.chat_format.stop_ids)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        expected, logits = tuned.generator.model(IDS).logits, stock(IDS).logits
    # the base is stored in bfloat16, and so is the merged model: each weight is rounded once
    assert (logits - expected).norm() / expected.norm() < 2e-2
    assert stock.generation_config.eos_token_id == list(tuned.generator.chat_format.stop_ids)


def test_merging_into_many_shards_or_one_file_gives_the_same_weights(rows: Path, tmp_path: Path) -> None:
    path = published.baichuan2(tmp_path / "model")
    tune(path, rows, tmp_path / "run")
    tuned = locate_tuned(tmp_path / "run")
    whole, many = tmp_path / "whole", tmp_path / "many"
    write_merged(tuned, whole)
    write_merged(tuned, many, shard_bytes=50_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    a, b = (load_weights(p, torch.float32).state_dict() for p in (whole, many))
    assert all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(ConfigError, match="already exists"):
        write_merged(tuned, whole)


# --- module names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "became"),
    [
        ("baichuan2", "[W_pack]", "W_pack means q_proj, k_proj, v_proj here"),
        ("glm4", "[query_key_value, dense, dense_h_to_4h, dense_4h_to_h]", "dense_h_to_4h means gate_up_proj here"),
    ],
)
def test_original_names_mean_the_native_modules(
    name: str, asked: str, became: str, rows: Path, luthier: Run, tmp_path: Path
) -> None:
    path = PUBLISHED[name](tmp_path / "model")
    done = luthier("check", "--model", path, "--data", rows, "--set", f"lora.target_modules={asked}")
    assert done.code == 0, done.err
    assert became in done.out


@pytest.mark.parametrize(
    ("name", "asked", "words", "fix"),
    [
        ("yi", "[q_attn, k_proj]", "'q_attn' is not a module of a llama model", "write q_proj for q_attn"),
        ("phi3", "[q_proj, k_proj, v_proj, gate_proj]", "are not modules of a phi3 model", "write qkv_proj for q_proj"),
        ("phi3", "[gate_proj, up_proj]", "are not modules of a phi3 model", "write gate_up_proj for gate_proj"),
        ("glm4-hf", "[gate_proj, up_proj]", "are not modules of a glm model", "write gate_up_proj for up_proj"),
        (
            "glm4-hf",
            "[query_key_value]",
            "is not a module of a glm model",
            "write q_proj, k_proj, v_proj for query_key",
        ),
        ("yi", "[W_pack]", "'W_pack' is not a module of a llama model", "write q_proj, k_proj, v_proj for W_pack"),
    ],
)
def test_names_of_other_models_are_refused_with_the_right_ones(
    name: str, asked: str, words: str, fix: str, rows: Path, luthier: Run, tmp_path: Path
) -> None:
    path = PUBLISHED[name](tmp_path / "model")
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"")  # no weight is read before the refusal
    done = luthier("check", "--model", path, "--data", rows, "--set", f"lora.target_modules={asked}")
    assert done.code == 2
    assert words in done.err
    assert fix in done.err


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_of_another_family_is_refused_with_a_fix_that_works(name: str, rows: Path, tmp_path: Path) -> None:
    """Every wrong pair is refused, like the tutorials' ChatML on Baichuan2, and typing the fix solves it."""
    path = PUBLISHED[name](tmp_path / "model")

    def refusal(choice: str) -> str | None:
        report = inspect(configs.build({"model": {"path": path}, "data": {"train": rows, "template": choice}}))
        return report.error.fix if report.error else None

    assert refusal("auto") is None
    refused = {choice: fix for choice in ("chatml", "jinja", *NATIVE) if (fix := refusal(choice))}
    assert len(refused) >= 5
    for choice, fix in refused.items():
        typed = re.search(r"--set data\.template=(\w+)$", fix)
        assert typed and refusal(typed.group(1)) is None, choice


def test_a_new_family_needs_only_a_record_and_a_template(
    rows: Path, luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CONTRIBUTING.md states, two table entries are enough for every verb to support the model."""
    turns = Turns(
        name="toy",
        user=("<|im_start|>Q: ", "<|im_end|>"),
        reply="<|im_start|>A:",
        stop=("<|im_end|>",),
        markers=("<|im_start|>", "<|im_end|>"),
    )
    path = published.yi(tmp_path / "model")
    tensors = {f"net.{name}": tensor for name, tensor in read_tensors(path).items()}
    for file in path.glob("model*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template")
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    edit(path, model_type="toy", architectures=["ToyForCausalLM"])

    def native(raw: Mapping[str, Any]) -> Any:
        return LlamaConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "architectures")})

    def layer_rules(_: Any) -> list[Rule]:
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".{i}.", name) for name in tensors)
        return [Rule(name, (name.removeprefix("net."),)) for name in names]

    monkeypatch.setitem(FAMILIES, "toy", Family("Toy", "llama", "toy", native, layer_rules))
    monkeypatch.setitem(NATIVE, "toy", (turns,))
    assert tune(path, rows, tmp_path / "run")["template"] == "toy"
    assert library.chat(tmp_path / "run").send("你是谁？", library.Sampling(max_new_tokens=4)).reply_tokens > 0
    for verb, to in (("merge", "merged"), ("export", "peft")):
        layout = ["--layout", "original"] if verb == "export" else []
        done = luthier(verb, tmp_path / "run", *layout, "--output-dir", tmp_path / to)
        assert done.code == 0, done.err
    tuned, merged, exported = (
        library.chat(**place).generator.model(IDS).logits.detach()
        for place in (
            {"path": tmp_path / "run"},
            {"path": tmp_path / "merged"},
            {"model": path, "adapter": tmp_path / "peft"},
        )
    )
    assert (merged - tuned).norm() / tuned.norm() < 2e-2
    assert (exported - tuned).abs().max() < 1e-4 * tuned.abs().max()
    assert "model.net.model.layers.0" in json.dumps(list(load_file(tmp_path / "peft" / "adapter_model.safetensors")))


# --- adapters trained elsewhere --------------------------------------------------------------------------------------


def stock_peft(path: Path, to: Path, modules: list[str], targets: list[str]) -> dict[str, Tensor]:
    """Write an adapter as stock PEFT does for the published model; returns the update of each published weight."""
    tensors, weights, deltas = dict[str, Tensor](), read_tensors(path), dict[str, Tensor]()
    torch.manual_seed(1)
    for module in modules:
        rows, columns = weights[f"{module}.weight"].shape
        a, b = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
        tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
        deltas[f"{module}.weight"] = 2.0 * b @ a
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (to / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_adapter_of_the_original_modules_is_exact(name: str, rows: Path, luthier: Run, tmp_path: Path) -> None:
    """The adapter was trained elsewhere on W_pack or query_key_value, and lists a target that does not exist."""
    path = PUBLISHED[name](tmp_path / "model")
    modules = [m for m in family_of(path).modules(read_config(path)) if "layers." in m]
    deltas = stock_peft(path, tmp_path / "peft", modules, [*{m.rpartition(".")[2] for m in modules}, "q_attn"])
    tensors = {n: t.float() + deltas.get(n, 0) for n, t in read_tensors(path).items()}
    expected = DEFINITIONS[name](tensors, published.read_config(path), IDS)
    session = library.chat(model=path, adapter=tmp_path / "peft")
    with torch.no_grad():
        logits = session.generator.model(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    argv = ["--model", path, "--adapter", tmp_path / "peft"]
    assert luthier("chat", *argv, "--prompt", "你好", "--max-new-tokens", 3).code == 0
    assert luthier("eval", *argv, "--data", rows, "--json", "--max-new-tokens", 8).code == 0
    assert luthier("merge", *argv, "--output-dir", tmp_path / "merged").code == 0
    model = load_weights(tmp_path / "merged", torch.float32)
    with torch.no_grad():
        assert (model(IDS).logits - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("name", DEFINITIONS)
def test_export_in_the_original_layout_is_the_same_model(name: str, rows: Path, luthier: Run, tmp_path: Path) -> None:
    path, run, out = PUBLISHED[name](tmp_path / "model"), tmp_path / "run", tmp_path / "peft"
    tune(path, rows, run, r=4, lora_alpha=8)
    done = luthier("export", run, "--to", "peft", "--layout", "original", "--output-dir", out)
    assert done.code == 0, done.err
    config = json.loads((out / "adapter_config.json").read_text())
    fused = {"baichuan2": "W_pack", "glm4": "query_key_value"}[name]
    assert fused in config["target_modules"]
    patterns = config["rank_pattern"]
    assert config["r"] == 4 and len(patterns) == 2  # of two layers
    assert all(name.endswith(fused) and rank == 12 for name, rank in patterns.items())
    expected = library.chat(run).generator.model(IDS).logits
    logits = library.chat(model=path, adapter=out).generator.model(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    refused = luthier("export", run, "--layout", "sideways", "--output-dir", tmp_path / "other")
    assert refused.code == 2 and "--layout sideways: is not a layout" in refused.err


def test_the_original_layout_of_a_native_checkpoint_is_refused(rows: Path, luthier: Run, tmp_path: Path) -> None:
    tune(published.yi(tmp_path / "model"), rows, tmp_path / "run")
    done = luthier("export", tmp_path / "run", "--layout", "original", "--output-dir", tmp_path / "out")
    assert done.code == 2 and "its module names are already the native ones" in done.err
    assert luthier("export", tmp_path / "run", "--to", "onnx", "--output-dir", tmp_path / "out").code == 2
    assert luthier("export", tmp_path / "run", "--output-dir", tmp_path / "out").code == 0
    done = luthier("export", tmp_path / "run", "--output-dir", tmp_path / "out")
    assert done.code == 2 and "already exists" in done.err


# --- checkpoints that are refused -----------------------------------------------------------------------------------


def edit(path: Path, **change: Any) -> Path:
    file = path / "config.json"
    values = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as e:
        load_weights(path, torch.float32)
    return e.value.message


def test_similar_but_unsupported_models_are_refused(tmp_path: Path) -> None:
    path = published.baichuan2(tmp_path / "b")
    assert "Baichuan 13B models use ALiBi positions, which no native class supports" in refused(
        edit(path, max_position_embeddings=None)
    )
    path = published.baichuan2(tmp_path / "b1")
    assert "Baichuan-7B (version 1) has a different head" in refused(edit(path, architectures=["BaiChuanForCausalLM"]))
    path = published.baichuan2(tmp_path / "b2")
    assert "config.json lacks rms_norm_eps" in refused(edit(path, rms_norm_eps=None))
    path = published.glm4(tmp_path / "g")
    assert "without padded_vocab_size does not have GLM-4's layout" in refused(edit(path, padded_vocab_size=None))
    path = published.glm4(tmp_path / "g1")
    assert "no native class supports a chatglm model with rmsnorm: False" in refused(edit(path, rmsnorm=False))
    path = published.yi(tmp_path / "q")
    assert "the checkpoint is already quantised" in refused(edit(path, quantization_config={"bits": 4}))


def test_every_tensor_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    path = published.baichuan2(tmp_path / "b", "safetensors")
    tensors = read_tensors(path)
    tensors.pop("model.layers.0.self_attn.W_pack.weight")
    tensors.pop("model.layers.1.self_attn.W_pack.weight")
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(3)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")
    assert refused(path).endswith(
        "the weights do not fit the model (missing: model.layers.0-1.self_attn.W_pack.weight; "
        "unexpected: model.layers.0.mlp.extra.weight; mismatched: model.norm.weight is [3], expected [64])"
    )


def test_buffers_that_the_model_computes_are_ignored_and_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    load_weights(published.deepseek(tmp_path / "d", inv_freq=True), torch.float32, log=messages.append)
    load_weights(published.glm4(tmp_path / "g"), torch.float32, log=messages.append)
    names = [m.partition("ignored, because the model computes them itself: ")[2] for m in messages]
    assert names == ["model.layers.0-1.self_attn.rotary_emb.inv_freq", "transformer.rotary_pos_emb.inv_freq"]


@pytest.mark.parametrize("stale", ["pointing to missing files", "pointing to other files", "not an index"])
def test_a_stale_index_beside_a_whole_file_is_ignored_as_in_transformers(
    stale: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_dir("llama"), path)
    shard = "model-00001-of-00002.safetensors"
    if stale == "pointing to other files":
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(tensors, path / shard, metadata={"format": "pt"})
    names = {} if stale == "not an index" else dict.fromkeys(load_file(path / "model.safetensors"), shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert [file.name for file in weight_files(path)] == ["model.safetensors"]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    ours = load_weights(path, torch.float32).state_dict()
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(tensor) for name, tensor in ours.items())


def test_damaged_weight_files_are_refused(tmp_path: Path) -> None:
    path = published.baichuan2(tmp_path / "b", "bin-shards")
    shards = sorted(path.glob("*.bin"))
    shards[0].write_bytes(shards[0].read_bytes()[:2000])
    assert "is damaged" in refused(path)
    shards[0].unlink()
    assert f"missing weight files: {shards[0].name}" in refused(path)
    (path / "pytorch_model.bin.index.json").write_text("{}")
    assert "has no valid weight_map" in refused(path)
    path = published.baichuan2(tmp_path / "c", "bin")
    torch.save([1, 2], path / "pytorch_model.bin")
    assert "it contains something other than named tensors" in refused(path)


def test_a_rotary_base_for_a_model_without_one_is_refused(model_dir: Callable[[str], Path]) -> None:
    config = read_config(model_dir("gemma2"))
    config.rope_parameters = None
    with pytest.raises(ConfigError, match=r"model.rope_theta would be ignored"):
        directory._set_rope_theta(config, 5.0)


def test_an_export_that_differs_when_read_back_is_refused(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(published.yi(tmp_path / "model"), rows, tmp_path / "run")
    to_native = peft.to_native

    def other(updates: dict[str, Update], modules: Modules) -> dict[str, Update]:  # of the adapter that is read back
        return {n: replace(u, b=u.b + 1) for n, u in to_native(updates, modules).items()}

    monkeypatch.setattr(peft, "to_native", other)
    with pytest.raises(AdapterError, match="differs when read back"):
        library.export(tmp_path / "run", output_dir=tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    shards = Shards.open(published.yi(tmp_path / "model"))
    for file in shards.files:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged .*unexpected end of file"):
        list(map(shards.read, shards.shapes))
