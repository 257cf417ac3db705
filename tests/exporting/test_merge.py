"""A merged model is verified to be the tuned one; any other is refused and nothing is left."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier as library
from luthier.adapters.locate import locate_tuned
from luthier.adapters.original_names import Update
from luthier.config import LoraConfig
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.exporting import merge
from luthier.models.chat_format import load_chat_format
from luthier.models.tokenizer.tokenizer import TOKENIZER_FILES
from luthier.types import Message
from tests.conftest import Result, teahouse
from tests.helpers import published
from tests.helpers.definitions import baichuan2_logits, glm4_logits
from tests.helpers.handover import SYSTEM, tuned
from tests.helpers.published import PUBLISHED, read_tensors

Run = Callable[..., Result]
ORIGINAL: dict[str, Callable[..., Tensor]] = {"baichuan2": baichuan2_logits, "glm4": glm4_logits}
IDS = torch.randint(3, 600, (2, 24), generator=torch.Generator().manual_seed(3))


def tree(*folders: Path) -> dict[str, str]:
    """Return the digest of every file."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for f in folders for p in f.rglob("*") if p.is_file()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    values: Tensor = model(input_ids=IDS).logits
    return values


# --- verification ---------------------------------------------------------------------------------------------------


def test_the_verification_is_printed_and_tight_in_fp32(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    adapter = tuned(model_dir("llama"), tmp_path / "run")
    done = luthier("merge", adapter, "--output-dir", tmp_path / "merged")
    assert done.code == 0, done.err
    printed = re.search(
        r"verified: .* on 4 prompts \((\d+) tokens, fp32\): maximum difference (\S+), mean (\S+) ", done.out
    )
    assert printed, done.out
    assert int(printed.group(1)) > 40
    assert 0 < float(printed.group(3)) <= float(printed.group(2)) < 1e-4


def test_a_run_with_dropout_is_merged_and_verified(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    """All five recipes train with dropout; the tuned model that the merge is compared with must not apply it."""
    run = tmp_path / "run"
    library.train(
        teahouse(model_dir("llama"), run, {}, max_steps=4, eval_time_ratio=0).model_copy(
            update={"lora": LoraConfig(lora_dropout=0.3)}
        )
    )
    done = luthier("merge", run, "--output-dir", tmp_path / "merged")
    assert done.code == 0, done.err
    printed = re.search(r"maximum difference (\S+), mean", done.out)
    assert printed and float(printed.group(1)) < 1e-4


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0])
def test_a_merge_with_another_update_is_refused_and_deleted(
    base: str,
    factor: float,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = model_dir("llama") if base == "fp32" else published.yi(tmp_path / "yi")
    adapter = tuned(path, tmp_path / "run")
    original = merge.delta

    def wrong(update: Update) -> Tensor:
        return factor * original(update)

    monkeypatch.setattr(merge, "delta", wrong)
    before = tree(path, adapter)
    with pytest.raises(ModelError, match="the merged model failed verification and was deleted") as e:
        library.merge(adapter, tmp_path / "merged")
    assert e.value.fix.startswith("report this bug of luthier")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))
    assert tree(path, adapter) == before


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_a_small_adapter_is_verified_by_what_rounding_leaves_of_it(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little training changes weights by less than bfloat16 can store: what is left is verified and reported."""
    path = published.yi(tmp_path / "yi")
    adapter = tuned(path, tmp_path / "run", size=0.003)
    original = merge.delta
    monkeypatch.setattr(merge, "delta", lambda update: factor * original(update))
    if factor == 1:
        done = library.merge(adapter, tmp_path / "merged")
        assert 0.01 < done.closeness.left < 0.9
        assert re.search(r"of which rounding leaves \d+%", done.closeness.summary())
    else:
        with pytest.raises(ModelError, match="the merged model failed verification"):
            library.merge(adapter, tmp_path / "merged")


def test_a_file_that_does_not_read_back_is_refused(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tuned(model_dir("llama"), tmp_path / "run")
    original = merge._write

    def cut(folder: Path, *rest: Any) -> Any:
        dtypes = original(folder, *rest)
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        return dtypes

    monkeypatch.setattr(merge, "_write", cut)
    with pytest.raises(ModelError, match="is damaged"):
        library.merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "glm", "gemma2"])
def test_stock_transformers_and_peft_give_the_same_logits(
    arch: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """fp32: the merged model, and the adapter over its base."""
    adapter = tuned(model_dir(arch), tmp_path / "run")
    library.merge(adapter, tmp_path / "merged")
    library.export(adapter, "peft", tmp_path / "peft")
    expected = logits(library.chat(adapter).generator.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-5
    for folder in (adapter, tmp_path / "peft"):
        base = AutoModelForCausalLM.from_pretrained(model_dir(arch), dtype=torch.float32)
        assert (logits(PeftModel.from_pretrained(base, folder).eval()) - expected).abs().max() < 1e-5


# --- other files than weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizer_files_are_copied_if_stock_transformers_reads_them(name: str, tmp_path: Path) -> None:
    base, merged = PUBLISHED[name](tmp_path / "base"), tmp_path / "merged"
    adapter = tuned(base, tmp_path / "run", system=None)
    library.merge(adapter, merged)
    ours = load_chat_format(base).tokenizer
    assert load_chat_format(merged).tokenizer.digest() == ours.digest()
    text = load_chat_format(base).prompt_text([Message("user", "Who are you?  你是谁？")])
    stock = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    assert stock(text, add_special_tokens=False).input_ids == list(ours.encode_batch([text])[0].ids)
    copied = {n for n in TOKENIZER_FILES if (base / n).is_file()} - {"chat_template.jinja"}
    same = {n for n in copied if (merged / n).is_file() and (merged / n).read_bytes() == (base / n).read_bytes()}
    built = {"baichuan2", "glm4"}  # no native class reads the published files of these
    config = "tokenizer_config.json"  # only the template in it changes
    assert same == (set() if name in built or name == "yi" else copied - {config})
    before, after = ({**json.loads((d / config).read_text()), "chat_template": ""} for d in (base, merged))
    assert name in built or name == "yi" or before == after
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(load_chat_format(base).stop_ids)


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_original_layout_is_the_published_checkpoint_with_updated_weights(
    name: str, luthier: Run, tmp_path: Path
) -> None:
    base, merged = PUBLISHED[name](tmp_path / "base"), tmp_path / "merged"
    adapter = tuned(base, tmp_path / "run")
    done = luthier("merge", adapter, "--layout", "original", "--output-dir", merged)
    assert done.code == 0, done.err
    assert "maximum difference" in done.out
    before, after = read_tensors(base), read_tensors(merged)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    fused = {"baichuan2": "W_pack", "glm4": "query_key_value"}[name]
    assert any(fused in n for n in changed)
    assert not [
        n for n in changed if "norm" in n or "embed" in n or "bias" in n or "lm_head" in n or "output_layer" in n
    ]
    merged_logits = ORIGINAL[name](after, published.read_config(merged), IDS)
    expected = logits(library.chat(adapter).generator.model)
    assert (merged_logits - expected).norm() / expected.norm() < 2e-2  # one rounding to bfloat16
    weights = {p.name for p in base.iterdir() if merge._holds_weights(p)}
    for file in {p.name for p in base.iterdir()} - weights - {"generation_config.json"}:
        assert (merged / file).read_bytes() == (base / file).read_bytes(), file
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(load_chat_format(base).stop_ids)


def test_unknown_layouts_are_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = tuned(model_dir("llama"), tmp_path / "run")
    with pytest.raises(ConfigError, match="its module names are already the native ones"):
        library.merge(adapter, tmp_path / "merged", layout="original")
    with pytest.raises(ConfigError, match="--layout sideways: is not a layout"):
        library.merge(adapter, tmp_path / "merged", layout="sideways")
    assert not (tmp_path / "merged").exists()


def test_an_adapted_head_that_the_published_code_rescales_is_refused(tmp_path: Path) -> None:
    base = published.baichuan2(tmp_path / "base")
    (tmp_path / "peft").mkdir()
    high, wide = read_tensors(base)["lm_head.weight"].shape
    parts = {"A": torch.randn(4, wide) * 0.1, "B": torch.randn(high, 4) * 0.1}
    save_file(
        {f"base_model.model.lm_head.lora_{k}.weight": t for k, t in parts.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["lm_head"], "bias": "none"}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    options = {"model": base, "adapter": tmp_path / "peft"}
    with pytest.raises(AdapterError, match="whose rows the published model code rescales"):
        library.merge(output_dir=tmp_path / "merged", layout="original", **options)
    assert library.merge(output_dir=tmp_path / "merged", **options).changed == 1


def test_merged_models_have_a_template_with_the_run_s_system_prompt(luthier: Run, tmp_path: Path) -> None:
    """Also in stock transformers; a system prompt in the conversation replaces it."""
    for name in ("yi", "phi3", "baichuan2", "glm4"):
        adapter = tuned(PUBLISHED[name](tmp_path / name), tmp_path / f"{name}-run")
        verb = ("merge",) if name in ("yi", "glm4") else ("export", "--to", "hf")
        done = luthier(verb[0], adapter, *verb[1:], "--output-dir", tmp_path / f"{name}-hf")
        assert done.code == 0, done.err
        assert "verified: logits of merged model and base+adapter" in done.out
        stock = AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf", local_files_only=True)
        template = locate_tuned(adapter).chat_format().template
        for system in (None, "Be brief."):
            asked = [Message("user", "a b"), Message("assistant", " c "), Message("user", "d\n")]
            messages = [Message("system", system), *asked] if system else asked
            text = stock.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
            )
            assert text == template.prompt([Message("system", system or SYSTEM), *asked])


def older_reading(content: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings and the dtype as transformers 4.57 does, without ``rope_parameters``."""
    scaling = content.get("rope_scaling") or {}
    return {
        "theta": content.get("rope_theta", 10000.0),
        "partial": content.get("partial_rotary_factor", 1.0),
        "type": scaling.get("rope_type", scaling.get("type", "default")),
        "factor": scaling.get("factor"),
        "dtype": content.get("torch_dtype", "float32"),
    }


NEW_FORM = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "older keys": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"},
        {"theta": 500.0, "type": "linear", "factor": 2.0, "dtype": "float32"},
    ),
    "new keys": (
        {"rope_parameters": NEW_FORM, "dtype": "float32"},
        {"theta": 500.0, "type": "linear", "factor": 2.0, "dtype": "float32"},
    ),
    "older keys without scaling": (
        {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "float32"},
        {"theta": 500.0, "type": "default", "factor": None, "dtype": "float32"},
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_a_merged_config_says_the_same_to_older_readers(
    rope: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    keys, expected = ROPES[rope]
    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base)
    content = json.loads((base / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "dtype", "torch_dtype"):
        content.pop(key, None)
    (base / "config.json").write_text(json.dumps({**content, **keys, "custom_note": "kept", "_name_or_path": "mine"}))
    library.merge(tuned(base, tmp_path / "run"), tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert older_reading(merged) == {**expected, "partial": 1.0}
    assert merged["rope_parameters"]["rope_theta"] == 500.0  # for readers of today
    assert merged["custom_note"] == "kept" and "_name_or_path" not in merged


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_merged_config_of_a_family_says_the_same_to_older_readers(name: str, tmp_path: Path) -> None:
    base = PUBLISHED[name](tmp_path / "base")
    library.merge(tuned(base, tmp_path / "run", None), tmp_path / "merged")
    rope = load_chat_format(base).config.rope_parameters
    read = older_reading(json.loads((tmp_path / "merged" / "config.json").read_text()))
    expected = {"theta": rope["rope_theta"], "partial": rope.get("partial_rotary_factor", 1.0), "dtype": "bfloat16"}
    assert read == {**expected, "type": "default", "factor": None}


def test_a_config_that_older_readers_misread_is_refused(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "rope_parameters": NEW_FORM}))
    monkeypatch.setattr(merge, "with_older_keys", lambda config, _: config)
    with pytest.raises(ModelError, match="readers without rope_parameters would compute rotary positions with"):
        library.merge(tuned(base, tmp_path / "run"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- refused, with outputs untouched -----------------------------------------------------------------------------

EXPORTS: list[list[str]] = [["merge"], ["export", "--to", "hf"], ["export", "--to", "gguf"], ["export", "--to", "peft"]]
DAMAGE: dict[str, tuple[str, str]] = {
    "a tampered adapter": ("is damaged or was altered", "copy the adapter directory again"),
    "another base": ("weights differ", "use the base model it was trained on"),
    "a truncated shard": ("is damaged", "download the model again"),
    "another vocabulary": ("the tokenizer differs", "use the base model it was trained on"),
}


def damage(what: str, base: Path, adapter: Path) -> None:
    if what == "a tampered adapter":
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] * 1.001}, file)
    elif what == "another base":
        shutil.rmtree(base)
        published.yi(base, seed=1)
    elif what == "a truncated shard":
        file = sorted(base.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        other = published.yi(base.with_name("other"), dummy_prefix=True, tokenizer_json=True)
        for name in TOKENIZER_FILES:
            if (other / name).is_file():
                shutil.copyfile(other / name, base / name)


@pytest.mark.parametrize("argv", [*EXPORTS, ["export", "--to", "gguf-lora"]], ids=" ".join)
def test_an_adapter_whose_matrices_differ_in_rank_is_refused(argv: list[str], luthier: Run, tmp_path: Path) -> None:
    """A stock adapter has no digest of its file, so only the shapes show the damage."""
    base = published.yi(tmp_path / "base")
    adapter = tuned(base, tmp_path / "adapter")
    (adapter / "luthier.json").unlink()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, first: tensors[first][:-1].contiguous()}, file)
    done = luthier(*argv, "--model", base, "--adapter", adapter, "--output-dir", tmp_path / "out")
    assert done.code == 2, (done.out, done.err)
    assert "[3, " in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_inputs_are_refused_and_outputs_are_untouched(what: str, luthier: Run, tmp_path: Path) -> None:
    base = published.yi(tmp_path / "base")
    adapter = tuned(base, tmp_path / "run")
    damage(what, base, adapter)
    before = tree(tmp_path)
    words, fix = DAMAGE[what]
    for argv in EXPORTS:
        done = luthier(*argv, adapter, "--output-dir", tmp_path / "out")
        assert done.code == 2, (argv, done.out)
        assert words in done.err and fix in done.err and "Traceback" not in done.err
    assert tree(tmp_path) == before  # no output, and no temporary files
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with_output = tree(tmp_path)
    for argv in EXPORTS:
        done = luthier(*argv, adapter, "--output-dir", tmp_path / "out")
        assert done.code == 2
    assert tree(tmp_path) == with_output


def test_logits_of_a_long_system_prompt_are_not_all_kept(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    short = library.merge(tuned(model_dir("llama"), tmp_path / "short", "Hi."), tmp_path / "a").closeness
    long = library.merge(tuned(model_dir("llama"), tmp_path / "long", "Hi there. " * 60), tmp_path / "b").closeness
    assert long.tokens < 4 * 64 + 100 and long.mean < 1e-4 and long.adapter > 0.01 and short.tokens < long.tokens
