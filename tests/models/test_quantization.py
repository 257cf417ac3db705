"""A quantised base around its law: the copy on disk, the library, optimizers, settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier as library
from luthier import config as configs
from luthier import personas
from luthier._util import files
from luthier.errors import ConfigError, MissingPackageError
from luthier.models import quantization
from luthier.models.checkpoint_reader import write_safetensors
from luthier.models.directory import read_config
from luthier.models.quantization import Quantisation
from luthier.models.quantized_loader import FourOrEight, cache_dir, load_quantised
from luthier.verbs.train import Stopped
from tests.conftest import Result

Run = Callable[..., Result]
NF4 = FourOrEight(Quantisation("nf4"), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier" / "quantised"


@pytest.fixture
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


def made(model: Path, run: Path, **values: Any) -> configs.RunConfig:
    train = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 2}
    base: dict[str, Any] = {
        "model": {"path": model, "load_in_4bit": True},
        "data": {"train": personas.TEAHOUSE},
        "train": train,
        "output_dir": run,
    }
    for key, value in values.items():
        base[key] = {**base[key], **value}
    return configs.build(base)


def load(model: Path, say: Callable[[str], None] = lambda _: None, wanted: FourOrEight = NF4) -> Any:
    return load_quantised(model, torch.float32, torch.device("cpu"), read_config(model), wanted, say)


def test_train_resume_chat_and_merge_in_four_bits(model: Path, luthier: Run, tmp_path: Path) -> None:
    whole, cut = made(model, tmp_path / "whole"), made(model, tmp_path / "cut")
    summary = library.train(whole)
    assert summary["quantised"] == "nf4"
    assert summary["losses"][-1] < summary["losses"][0]
    assert (
        summary["parameters"]
        == sum(p.numel() for p in library.load_model(model)[0].parameters()) + (summary["trainable_parameters"])
    )
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        library.train(cut, stop=lambda: next(asked))
    library.train(cut)
    weights = [
        (p / "adapter" / "adapter_model.safetensors").read_bytes() for p in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert weights[0] == weights[1]
    assert library.chat(tmp_path / "whole").send("你是谁？", library.Sampling(max_new_tokens=3)).reply_tokens
    done = luthier("merge", tmp_path / "whole", "--output-dir", tmp_path / "merged")
    assert done.code == 0, done.err
    base = load_file(model / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tuned = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    a, b = (tuned[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
    # the base's own weights and the update: not the 4-bit ones, which are a tenth away
    torch.testing.assert_close(merged[name], base[name] + whole.lora.lora_alpha / whole.lora.r * (b @ a))


def test_the_copy_is_named_by_the_model_and_the_form(model: Path, model_dir: Callable[[str], Path]) -> None:
    config = read_config(model)
    own = cache_dir(model, config, NF4, torch.float32)
    others = {
        cache_dir(model, config, FourOrEight(Quantisation("int8"), torch.float32), torch.float32),
        cache_dir(model, config, FourOrEight(Quantisation("nf4", double=False), torch.float32), torch.float32),
        cache_dir(model, config, NF4, torch.bfloat16),
        cache_dir(model_dir("qwen2"), read_config(model_dir("qwen2")), NF4, torch.float32),
    }
    assert len({own, *others}) == 5
    assert own == cache_dir(model, config, FourOrEight(Quantisation("nf4"), torch.bfloat16), torch.float32)


def test_a_disk_without_room_costs_the_copy_not_the_run(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr("luthier.models.quantized_loader.write_safetensors", full)
    assert load(model, said.append) is not None
    assert "the quantised base is not kept on disk ([Errno 28] No space left" in said[-1]
    assert list(cache.iterdir()) == []


def test_killed_while_loading_nothing_is_left_half_written(model: Path, cache: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from luthier.models import quantized_loader as q\n"
        "from luthier.models.directory import read_config; from luthier.models.quantization import Quantisation\n"
        "plain = q.write_safetensors\n"
        "def write(*args): plain(*args); os.kill(os.getpid(), 9)\n"
        "q.write_safetensors = write\n"
        "path = Path(sys.argv[1]); wanted = q.FourOrEight(Quantisation('nf4'), torch.float32)\n"
        "q.load_quantised(path, torch.float32, torch.device('cpu'), read_config(path), wanted)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, check=False)
    assert done.returncode == -9
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == []
    said: list[str] = []
    load(model, said.append)
    assert "kept in" in said[-1]
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def test_the_cache_can_be_left_out(model: Path, cache: Path) -> None:
    load(model, wanted=FourOrEight(Quantisation("nf4"), torch.float32, cache=False))
    assert not cache.exists()


def test_our_safetensors_are_the_librarys(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.ones((), dtype=torch.bfloat16),
    }
    write_safetensors(tmp_path / "t.safetensors", tensors)
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[n], t) and read[n].dtype is t.dtype for n, t in tensors.items())


def test_kernels_are_never_fetched(tmp_path: Path) -> None:
    """With the package ``kernels`` installed bitsandbytes would ask a hub for code: here it never sees the package."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from luthier.models.quantization import library; library()\n"
        "import bitsandbytes.backends.cpu.ops; assert 'kernels' not in sys.modules; print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_without_its_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization.library.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    try:
        with pytest.raises(MissingPackageError, match="a quantised base needs the package bitsandbytes") as e:
            load(model)
        assert e.value.fix == "pip install 'luthier[qlora]'"
    finally:
        quantization.library.cache_clear()


def test_eight_bit_optimizer_learns_and_resumes_bit_for_bit(model: Path, tmp_path: Path) -> None:
    lora = configs.LoraConfig(r=64)  # states of more than 4,096 values are kept in 8 bits
    both = (made(model, tmp_path / name, train={"optim": "adamw_8bit"}) for name in ("w", "c"))
    whole, cut = (config.model_copy(update={"lora": lora}) for config in both)
    losses = library.train(whole)["losses"]
    assert losses[-1] < losses[0]
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        library.train(cut, stop=lambda: next(asked))
    library.train(cut)
    files_ = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("w", "c")]
    assert files_[0] == files_[1]


def test_a_paged_optimizer_says_what_runs_here(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    values = {"train": {"optim": "paged_adamw_32bit", "max_steps": 2}}
    library.train(made(model, tmp_path / "paged", **values), say=said.append)
    assert any("adamw_torch is used here" in s for s in said)
    library.train(made(model, tmp_path / "plain", train={"max_steps": 2}))
    read = [files.sha256(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("paged", "plain")]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type would be ignored without model.load_in_4bit"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        configs.build({"model": {"path": model, **settings}, "data": {"train": personas.TEAHOUSE}})


_READ = """
import sys, threading, psutil, torch
from pathlib import Path
from luthier.models.families.base import Rule
from luthier.models.checkpoint_reader import Shards

shards, me = Shards.open(Path(sys.argv[1])), psutil.Process()
before, most, done = me.memory_info().rss, [0], threading.Event()

def watch():
    while not done.wait(0.0005):
        most[0] = max(most[0], me.memory_info().rss)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
head = Rule("head", ("head",), unit_rows=True)
part = dict(head.split(shards.read("head"), torch.bfloat16, own=True))["head"]
done.set(), watcher.join()
assert torch.allclose(part[::999].float().norm(dim=1), torch.ones(1), atol=1e-2)
print((most[0] - before) / (part.numel() * part.element_size()))
"""


def test_a_large_head_in_a_pickle_file_is_in_memory_once(tmp_path: Path) -> None:
    """Baichuan2's: read and scaled to unit rows, neither the file's pages nor a second copy stay beside it."""
    torch.save({"head": torch.randn(100_000, 1024, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", _READ, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.5
