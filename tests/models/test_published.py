"""The tiny test checkpoints have the published keys, names and ids, and load in transformers if it supports them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import vocabularies as v
from tests.helpers.published import (
    CONFIGS,
    PUBLISHED,
    baichuan2,
    deepseek,
    glm4,
    glm4_hf,
    phi3,
    read_config,
    read_tensors,
    yi,
)

NATIVE = ("yi", "phi3", "glm4-hf", "deepseek")
FULL = {
    "yi": "yi-6b-chat",
    "phi3": "phi-3-mini-4k-instruct",
    "baichuan2": "baichuan2-7b-chat",
    "glm4": "glm-4-9b-chat",
    "glm4-hf": "glm-4-9b-chat-hf",
    "deepseek": "deepseek-llm-7b-chat",
}
SIZES = {
    *(
        "hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
        "kv_channels",
        "head_dim",
        "padded_vocab_size",
        "vocab_size",
    ),
    *("num_attention_heads", "num_key_value_heads", "multi_query_group_num", "num_hidden_layers", "num_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("published")
    checkpoints: dict[str, Path] = {}
    return lambda name: checkpoints.setdefault(name, checkpoints.get(name) or PUBLISHED[name](root / name))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_differs_from_the_published_one_only_in_sizes_and_ids(checkpoint: Any, name: str) -> None:
    config, full = read_config(checkpoint(name)), read(CONFIGS / f"{FULL[name]}.json")
    assert list(config) == list(full)
    assert {key for key in full if config[key] != full[key]} <= SIZES


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_bfloat16_and_their_index_is_correct(checkpoint: Any, name: str) -> None:
    path = checkpoint(name)
    tensors = read_tensors(path)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for index in path.glob("*.index.json"):
        files = read(index)["weight_map"]
        assert files.keys() == tensors.keys()
        assert {path / f for f in files.values()} == {*path.glob("*.safetensors"), *path.glob("*.bin")}
        assert read(index)["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_seed_gives_another_model(checkpoint: Any, tmp_path: Path, name: str) -> None:
    one, same, other = (
        read_tensors(p)
        for p in (checkpoint(name), PUBLISHED[name](tmp_path / "a"), PUBLISHED[name](tmp_path / "b", seed=1))
    )
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert all(not torch.equal(one[n], other[n]) for n in one if not n.endswith("inv_freq"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_python_file_raises(checkpoint: Any, name: str) -> None:
    path = checkpoint(name)
    named = {n.partition(".")[0] for n in read_config(path).get("auto_map", {}).values()}
    files = {f.stem: f for f in path.glob("*.py")}
    assert named <= files.keys()
    assert bool(files) == (name in ("phi3", "baichuan2", "glm4"))
    for file in files.values():
        with pytest.raises(RuntimeError, match="remote code ran"):
            exec(compile(file.read_text(encoding="utf-8"), file, "exec"), {})


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_native_families_load_as_published(checkpoint: Any, name: str) -> None:
    """No tensor is missing, unexpected or of another shape; attention is not uniform, logits are not constant."""
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint(name), output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    out = model(torch.arange(300, 324)[None], output_attentions=True)
    last = torch.cat([layer[0, :, -1] for layer in out.attentions])  # [heads, 24]
    assert last.max(-1).values.mean() > 2 / 24
    assert out.logits.std() > 0.3


def test_names_and_shapes_of_the_families_that_are_not_native(checkpoint: Any) -> None:
    glm, baichuan = read_tensors(checkpoint("glm4")), read_tensors(checkpoint("baichuan2"))
    layer = "transformer.encoder.layers.1"
    assert glm[f"{layer}.self_attention.query_key_value.weight"].shape == (64 + 32 + 32, 64)
    assert glm[f"{layer}.self_attention.query_key_value.bias"].shape == (128,)
    assert glm[f"{layer}.mlp.dense_h_to_4h.weight"].shape == (192, 64)
    assert glm["transformer.rotary_pos_emb.inv_freq"].shape == (4,)
    assert len(glm) == 2 * 7 + 4
    assert baichuan["model.layers.1.self_attn.W_pack.weight"].shape == (192, 64)
    assert baichuan["lm_head.weight"].float().norm(dim=-1).std() > 0.1
    assert len(baichuan) == 2 * 7 + 3


def test_every_kind_of_weight_file_holds_the_same_tensors(tmp_path: Path) -> None:
    kinds = {
        "bin": ["pytorch_model.bin"],
        "bin-shards": [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)],
        "safetensors": [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)],
    }
    tensors_by_kind = {}
    for kind, files in kinds.items():
        path = baichuan2(tmp_path / kind, kind)
        assert sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".safetensors")) == files
        tensors_by_kind[kind] = read_tensors(path)
    assert (
        tensors_by_kind["bin"].keys() == tensors_by_kind["bin-shards"].keys() == tensors_by_kind["safetensors"].keys()
    )
    assert all(torch.equal(t, tensors_by_kind[kind][n]) for n, t in tensors_by_kind["bin"].items() for kind in kinds)
    plain, buffers = (read_tensors(deepseek(tmp_path / str(b), inv_freq=b)) for b in (False, True))
    assert buffers.keys() - plain.keys() == {f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in (0, 1)}


def test_yi_ids_are_the_published_ones(tmp_path: Path) -> None:
    path = yi(tmp_path, tokenizer_json=True)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert len(sp) == read_config(path)["vocab_size"]
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 6, 7)] == [
        "<unk>",
        "<|startoftext|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert sp.encode("<|im_end|>\n") == [7, 144]
    assert sp.encode("the", out_type=str)[0] != "▁"
    prefixed = sentencepiece.SentencePieceProcessor(model_proto=v.yi(dummy_prefix=True))
    assert prefixed.encode("the", out_type=str)[0].startswith("▁")
    # the converted file puts "▁" before the text
    fast = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert fast.encode("the").tokens == prefixed.encode("the", out_type=str)
    generation, config = read(path / "generation_config.json"), read_config(path)
    assert (generation["eos_token_id"], config["eos_token_id"]) == (7, 2)


@pytest.mark.parametrize("form", ["current", "april"])
def test_phi3_ids_are_the_published_ones(tmp_path: Path, form: Any) -> None:
    path = phi3(tmp_path, form=form)
    fast, sp = (
        Tokenizer.from_file(str(path / "tokenizer.json")),
        sentencepiece.SentencePieceProcessor(model_proto=v.llama2()),
    )
    assert len(sp) == 640
    for text in v.corpus():
        assert fast.encode(text, add_special_tokens=False).ids == sp.encode(text)
    marks = {t: fast.token_to_id(t) for t in v.PHI3_ADDED}
    assert list(marks.values()) == list(range(640, 651))
    ids = fast.encode("<|user|>\nthe lamp<|end|>\n<|assistant|>\n").ids
    start = [1] if form == "april" else []
    assert ids == [*start, marks["<|user|>"], *sp.encode("the lamp"), marks["<|end|>"], marks["<|assistant|>"]]
    stops = {"april": [640, 647], "current": [640, 641, 647]}  # 32000, 32001, 32007
    assert read(path / "generation_config.json")["eos_token_id"] == stops[form]
    hf = AutoTokenizer.from_pretrained(path)
    text = hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == ("<s>" if form == "april" else "") + "<|user|>\nhi<|end|>\n<|assistant|>\n"


def test_baichuan2_ids_are_the_published_ones(tmp_path: Path) -> None:
    path = baichuan2(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert len(sp) == read_config(path)["vocab_size"]
    assert sp.encode("<reserved_106>\n<reserved_107>") == [195, 5, 196]
    assert sp.encode("lamp lamp", out_type=str)[0] != "▁lamp"
    text = "  嬛 and 茶  \n\tx"
    assert sp.decode(sp.encode(text)) == text
    assert any(sp.is_byte(i) for i in sp.encode("嬛"))
    generation = read(path / "generation_config.json")
    assert [generation[f"{who}_token_id"] for who in ("user", "assistant", "eos")] == [195, 196, 2]
    assert not (path / "tokenizer.json").exists()


def test_glm4_ids_are_the_published_ones(tmp_path: Path) -> None:
    path, hf = glm4(tmp_path / "original"), glm4_hf(tmp_path / "hf")
    lines = (line.split() for line in (path / "tokenizer.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    added = read(path / "tokenizer_config.json")["added_tokens_decoder"]
    special = {entry["content"]: int(i) for i, entry in added.items()}
    assert sorted([*ranks.values(), *special.values()]) == list(range(654))
    reference = tiktoken.Encoding("glm4", pat_str=v.GLM4_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    fast = Tokenizer.from_file(str(hf / "tokenizer.json"))
    for text in (*v.corpus(), "[gMASK]<sop><|user|>\n12345 嬛<|assistant|>"):
        assert fast.encode(text).ids == reference.encode(text, allowed_special="all")
    assert reference.encode("\n") == [198]
    stops = [reference.encode(t, allowed_special="all")[0] for t in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert read_config(path)["eos_token_id"] == read_config(hf)["eos_token_id"] == stops
    assert read_config(path)["rope_ratio"] == 500
    assert read_config(hf)["rope_theta"] == 10000.0
    tokenizer = AutoTokenizer.from_pretrained(hf)
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert text == "[gMASK]<sop><|system|>\ns<|user|>\nq<|assistant|>"


def test_deepseek_ids_are_the_published_ones(tmp_path: Path) -> None:
    path = deepseek(tmp_path)
    hf = AutoTokenizer.from_pretrained(path)
    config = read_config(path)
    assert hf.convert_tokens_to_ids([v.DEEPSEEK_BOS, v.DEEPSEEK_EOS, "ø"]) == [640, 641, 642]
    assert (config["bos_token_id"], config["eos_token_id"]) == (640, 641)
    assert len(hf) < config["vocab_size"]
    assert hf.decode(hf.encode("the  lamp 灯", add_special_tokens=False)) == "the  lamp 灯"
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert hf.apply_chat_template(rows, tokenize=False) == f"{v.DEEPSEEK_BOS}User: q\n\nAssistant: a{v.DEEPSEEK_EOS}"
