"""GGUF files hold the tuned model, verified with llama.cpp; a file that would not is refused and nothing is left."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer as Fast
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import luthier as library
from luthier._util.installation import install_command
from luthier.adapters.locate import locate_tuned
from luthier.config import LoraConfig
from luthier.errors import ConfigError, ModelError
from luthier.evaluation.agreement import agreement
from luthier.exporting import formats
from luthier.exporting.gguf import architectures, vocabulary, writer
from luthier.models.directory import read_config
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.types import SystemRole
from tests.conftest import TOKENIZER, Result
from tests.exporting.test_merge import tree
from tests.helpers import published
from tests.helpers.handover import SYSTEM, tuned
from tests.helpers.published import PUBLISHED

Run = Callable[..., Result]
COUNT = re.compile(r"on (\d+) of 16 prompts \((\d+) tokens\)(?:; elsewhere at most (\S+) below)?")


def counted(line: str) -> tuple[int, int, float]:
    """Return the number of prompts that agree, of tokens, and the largest distance of a near tie."""
    match = COUNT.search(line)
    assert match, line
    return int(match.group(1)), int(match.group(2)), float(match.group(3) or 0)


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, "phi3-april", "deepseek-merge"])
def test_the_gguf_file_of_every_family_is_the_tuned_model(name: str, luthier: Run, tmp_path: Path) -> None:
    """One complete file, and llama.cpp agrees. Random models have many near ties, all of them close."""
    role: SystemRole = "merge" if name == "deepseek-merge" else "template"
    base = tmp_path / "base"
    published.phi3(base, form="april") if name == "phi3-april" else PUBLISHED[name.partition("-m")[0]](base)
    system = None if name in ("phi3-april", "deepseek") else SYSTEM
    adapter = tuned(base, tmp_path / "marlow", system, system_role=role)
    done = luthier("export", adapter, "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["marlow-f16.gguf"]
    assert "verified: its template writes luthier's prompts" in done.out
    same, tokens, furthest = counted(done.out)
    assert same >= 11 and tokens > 200 and furthest < 0.01
    inside = fields(tmp_path / "out" / "marlow-f16.gguf")
    chat_format = locate_tuned(adapter).chat_format()
    assert inside["tokenizer.ggml.eos_token_id"] == chat_format.stop_ids[0]
    assert inside["tokenizer.ggml.add_bos_token"] is False
    assert (json.dumps(system, ensure_ascii=False) in inside["tokenizer.chat_template"]) == (system is not None)


@pytest.mark.parametrize("quantization", ["q8_0", "q4_0"])
def test_quantised_files_are_verified_by_their_own_values(
    quantization: str, model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    adapter = tuned(model_dir("qwen2"), tmp_path / "run")
    done = luthier("export", adapter, "--to", "gguf", "--quantization", quantization, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert "replies equal those of the file's own values in fp32" in done.out
    assert f"after rounding to {quantization}, they equal those of base+adapter" in done.out
    file = tmp_path / "out" / f"run-{quantization}.gguf"
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == quantization.upper()
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_q.bias"] == "F32"
    read = writer.reader(file, read_config(model_dir("qwen2")))
    model = library.chat(adapter).generator.model
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.base.weight + layer.scaling * (layer.lora_B @ layer.lora_A)
    step = expected.abs().max() / {"q8_0": 127, "q4_0": 8}[quantization]
    assert 0 < (read("model.layers.0.self_attn.q_proj.weight") - expected).abs().max() <= 1.01 * step


@pytest.mark.parametrize("name", ["yi", "phi3", "glm4"])
def test_an_adapter_file_works_over_the_file_of_its_base_model(name: str, luthier: Run, tmp_path: Path) -> None:
    """Rank-stabilised and on some modules only: B makes up for llama.cpp's other scaling."""
    lora = LoraConfig.model_validate({"r": 4, "lora_alpha": 6, "use_rslora": True})
    base = PUBLISHED[name](tmp_path / "base")
    adapter = tuned(base, tmp_path / "run", lora=lora, targets=None if name == "phi3" else ["q_proj", "down_proj"])
    done = luthier("export", adapter, "--to", "gguf-lora", "--output-dir", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["proven"] and report["files"] == ["chat_template.jinja", "run-lora.gguf"]
    assert f"--chat-template-file {tmp_path / 'out' / 'chat_template.jinja'}" in report["notes"][-1]
    assert json.dumps(SYSTEM, ensure_ascii=False) in (tmp_path / "out" / "chat_template.jinja").read_text("utf-8")
    same, _, furthest = counted(report["proof"][0])
    assert same >= 11 and furthest < 0.01
    inside = fields(tmp_path / "out" / "run-lora.gguf")
    assert inside["general.type"] == "adapter" and inside["adapter.lora.alpha"] == 6


@pytest.mark.parametrize("rope", ["llama3", "linear"])
def test_rotary_scaling_is_written_as_llama_cpp_computes_it(rope: str, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"rope_type": rope, "rope_theta": 500.0, "factor": 4.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model(
        "llama", vocab_size=640, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, rope_parameters=scaling, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        [p.normal_(0, 0.1) for p in model.parameters() if p.ndim > 1]
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(TOKENIZER, tmp_path / "base", dirs_exist_ok=True)
    if rope == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 32, 2) / 32)
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
        ours = architectures.rope_factors(config)
        assert ours is not None
        torch.testing.assert_close(plain / torch.from_numpy(ours), theirs)
    done = library.export(tuned(tmp_path / "base", tmp_path / "run"), "gguf", tmp_path / "out")
    same, _, furthest = counted(done.verification[1])
    assert same >= 11 and furthest < 0.01


# --- failed verification --------------------------------------------------------------------------------------------


def without_adapter(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {}


FAULTS: dict[str, tuple[object, str, Any, str]] = {
    "rows in the wrong order": (writer, "reordered", lambda *_: lambda t: t, "below the likeliest one (limit"),
    "the adapter left out": (formats, "pending_updates", without_adapter, "below the likeliest one (limit"),
    "a template without the system prompt": (
        writer,
        "template_text",
        lambda v, _: v.tokenizer.chat_template,
        "its template writes",
    ),
    "stop tokens that do not end a reply": (vocabulary, "write", None, "does not end a reply"),
    "scores in the wrong order": (vocabulary, "read", None, "it tokenises"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_the_tuned_model_is_refused_and_deleted(
    fault: str, luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, value, words = FAULTS[fault]
    original: Any = getattr(owner, name)
    if fault == "stop tokens that do not end a reply":

        def value(writer: Any, tokens: Any, stops: Any, *rest: Any) -> None:
            original(writer, tokens, [20, 21, 22], *rest)

    if fault == "scores in the wrong order":

        def value(*args: Any) -> Any:
            tokens = original(*args)
            tokens.scores.sort()
            return tokens

    monkeypatch.setattr(owner, name, value)
    if "below the likeliest" not in words:  # found before the weights, which take minutes for a large model
        monkeypatch.setattr(writer, "write_model", lambda *_: pytest.fail("the weights were written"))
    # llama.cpp does not know the stop tokens of this family by name; scores matter only to SentencePiece vocabularies
    adapter = tuned((published.glm4 if "stop tokens" in fault else published.yi)(tmp_path / "base"), tmp_path / "run")
    before = tree(tmp_path)
    done = luthier("export", adapter, "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 2, done.out
    assert "verification with llama.cpp failed, so the file was deleted" in done.err
    assert words in done.err
    assert tree(tmp_path) == before


def test_an_adapter_file_with_other_values_is_refused(
    luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "scaling", lambda _: 0.5)
    adapter = tuned(published.yi(tmp_path / "base"), tmp_path / "run")
    done = luthier("export", adapter, "--to", "gguf-lora", "--output-dir", tmp_path / "out")
    assert done.code == 2 and "below the likeliest one (limit" in done.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_llama_cpp_cannot_load_is_refused(
    luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may crash, ours does not."""
    original = writer.write_model

    def cut(model: Any, chat_format: Any, pending: Any, file: Path, *rest: Any) -> None:
        original(model, chat_format, pending, file, *rest)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    monkeypatch.setattr(writer, "write_model", cut)
    adapter = tuned(published.yi(tmp_path / "base"), tmp_path / "run")
    done = luthier("export", adapter, "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert re.search(r"cannot run this file \(error loading model: .*file bounds", done.err)
    assert not (tmp_path / "out").exists()


def test_without_llama_cpp_the_report_is_that_nothing_was_verified(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    adapter = tuned(model_dir("llama"), tmp_path / "run")
    for to in ("gguf", "gguf-lora"):
        done = luthier("export", adapter, "--to", to, "--output-dir", tmp_path / to)
        assert done.code == 0, done.err
        assert "not verified: xllamacpp, which runs llama.cpp, is not installed" in done.out
        assert f"{install_command('export')}, then export again" in done.out and "\nverified:" not in done.out
    done = luthier("export", adapter, "--to", "gguf", "--json", "--output-dir", tmp_path / "json")
    assert json.loads(done.out)["proven"] is False


def test_a_sliding_window_is_refused_if_it_changes_replies_and_noted_otherwise(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    """A window of 24 tokens is shorter than the prompts, so verification fails; that of Phi-3 is longer."""
    adapter = tuned(model_dir("phi3"), tmp_path / "run")
    done = luthier("export", adapter, "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 2 and "below the likeliest one (limit" in done.err
    done = luthier("export", tuned(published.phi3(tmp_path / "p"), tmp_path / "r"), "--to", "gguf",
                   "--output-dir", tmp_path / "noted")  # fmt: skip
    assert done.code == 0 and "note: llama.cpp does not limit this model's attention to the last" in done.out


# --- refused before a file is written -------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused(model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path) -> None:
    adapter = tuned(model_dir("llama"), tmp_path / "run")
    for argv, words in (
        (["--to", "ggufs"], "--to ggufs: is not a format"),
        (["--to", "gguf", "--layout", "native"], "--layout would be ignored"),
        (["--to", "peft", "--quantization", "q8_0"], "--quantization would be ignored"),
        (["--to", "gguf", "--quantization", "q4_K"], "--quantization q4_K: is not a type that can be written"),
        (["--to", "hf", "--layout", "original"], "its module names are already the native ones"),
    ):
        done = luthier("export", adapter, *argv, "--output-dir", tmp_path / "out")
        assert done.code == 2 and words in done.err, done.err
        assert not (tmp_path / "out").exists()


def test_models_that_llama_cpp_would_compute_differently_are_refused(model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="a gemma2 model cannot be written as GGUF"):
        architectures.architecture(read_config(model_dir("gemma2")))
    for change, words in (
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling yarn"),
    ):
        config = read_config(model_dir("llama"))
        for key, value in change.items():
            setattr(config, key, value)
        with pytest.raises(ModelError, match=f"a llama model with {words} cannot be written as GGUF"):
            architectures.architecture(config)
    config = read_config(model_dir("qwen2"))
    config.use_sliding_window = True
    with pytest.raises(ModelError, match="a qwen2 model with a sliding window cannot be written as GGUF"):
        architectures.architecture(config)


def altered(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    described = load_tokenizer(TOKENIZER).described()
    change(described)
    hf = load_tokenizer(TOKENIZER).hf
    tokenizer = Tokenizer(hf)
    tokenizer._fast = Fast.from_str(json.dumps(described))
    return tokenizer


def test_vocabularies_that_llama_cpp_does_not_support_are_refused() -> None:
    def cut_at_commas(whole: dict[str, Any]) -> None:
        comma = {"type": "Split", "pattern": {"Regex": ","}, "behavior": "Isolated", "invert": False}
        whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [comma, whole["pre_tokenizer"]]}

    def words(whole: dict[str, Any]) -> None:
        whole["model"] = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "a"}

    with pytest.raises(ModelError, match="no pre-tokenizer that splits text as this model's tokenizer does"):
        vocabulary.read(altered(cut_at_commas), 640)
    with pytest.raises(ModelError, match="a model with a WordLevel vocabulary cannot be written as GGUF"):
        vocabulary.read(altered(words), 640)
    assert vocabulary.read(load_tokenizer(TOKENIZER), 650).tokens[-1] == "[PAD649]"


def test_values_outside_the_range_of_f16_are_refused() -> None:
    big = torch.full((1, 32), 1e5).numpy()
    file_type = writer.file_type_of("f16")
    with pytest.raises(ModelError, match="has values outside the range of f16"):
        writer._encoded("x.weight", big, file_type.matrices)
    with pytest.raises(ConfigError, match="is not a type that can be written"):
        writer.file_type_of("f8")


def test_a_system_prompt_may_be_longer_than_llama_cpp_s_default_context(
    model_dir: Callable[[str], Path], luthier: Run, tmp_path: Path
) -> None:
    adapter = tuned(model_dir("llama"), tmp_path / "run", "Keep the lamp. " * 120)
    done = luthier("export", adapter, "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert counted(done.out)[0] >= 11


def test_only_a_model_named_phi_3_strips_white_space_after_control_tokens() -> None:
    assert writer._model_name("marlow", True) == "marlow (Phi-3)"
    assert "phi-3" not in writer._model_name("my-Phi-3-run", False) and writer._model_name("marlow", False) == "marlow"


def test_near_ties_are_counted(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """The most likely tokens agree; a reply with the second most likely token is below by their difference."""
    run = locate_tuned(tuned(model_dir("llama"), tmp_path / "run"))
    model = library.chat(run.adapter.path).generator.model
    ids = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        firsts = [model(torch.tensor([row])).logits[0, -1] for row in ids]
    replies = [[int(f.argmax())] for f in firsts]
    assert agreement(model, ids, replies).same == 2
    second = int(firsts[1].topk(2).indices[1])
    other = agreement(model, ids, [replies[0], [second]])
    assert other.same == 1
    assert other.furthest == pytest.approx(float(firsts[1].max() - firsts[1][second]), abs=1e-5)
