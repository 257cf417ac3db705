"""Quantised base models: the copy on disk, the bitsandbytes import, optimizers and settings."""

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
from luthier._util.installation import install_command
from luthier.errors import ConfigError, MissingPackageError
from luthier.kernels import native
from luthier.models import quantization
from luthier.models.checkpoint_reader import Shards, write_safetensors
from luthier.models.directory import read_config
from luthier.models.quantization import Quantisation, QuantLinear, bitsandbytes_functions
from luthier.models.quantized_loader import QuantisedOptions, cache_dir, load_quantised
from luthier.verbs.train import Stopped
from tests.conftest import Result

Run = Callable[..., Result]
NF4 = QuantisedOptions(Quantisation("nf4"), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier" / "quantised"


@pytest.fixture
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


def run_config(model: Path, run: Path, **values: Any) -> configs.RunConfig:
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


KINDS = [Quantisation("nf4"), Quantisation("nf4", double=False), Quantisation("fp4"), Quantisation("int8")]


def stored(rows: int, columns: int, how: Quantisation, dtype: torch.dtype) -> QuantLinear:
    """Return a quantised layer with a random weight and bias."""
    torch.manual_seed(rows)
    linear = torch.nn.Linear(columns, rows)
    layer = QuantLinear(linear, how, dtype)
    for part, tensor in quantization.quantise(linear.weight.detach(), how).items():
        setattr(layer, part, tensor)
    return layer


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (16,), (17,)], ids=str)
def test_a_few_inputs_are_multiplied_with_the_stored_weight(
    shape: tuple[int, ...], dtype: torch.dtype, how: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the product with the dequantised weight, which then is not made."""
    layer = stored(75, 1152, how, dtype)
    x = torch.randn(*shape, 1152, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = layer(x).detach()  # with autograd, so the weight is dequantised
    made: list[QuantLinear] = []
    whole = QuantLinear.dequantised
    monkeypatch.setattr(QuantLinear, "dequantised", lambda self, *a: made.append(self) or whole(self, *a))
    with torch.no_grad():
        out = layer(x)
    assert out.shape == expected.shape and out.dtype is dtype
    bound = 1e-6 if dtype is torch.float32 else 0.01
    assert float((out - expected).float().norm() / expected.float().norm()) < bound
    assert bool(made) == (shape == (17,) or native.why_unavailable(torch.float32) is not None)


@pytest.mark.parametrize("columns", [96, 100])
def test_rows_that_do_not_end_with_a_block_are_dequantised(columns: int) -> None:
    layer = stored(12, columns, Quantisation("nf4"), torch.float32)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.requires_grad_()).detach())


def load(model: Path, log: Callable[[str], None] = lambda _: None, options: QuantisedOptions = NF4) -> Any:
    return load_quantised(model, torch.float32, torch.device("cpu"), read_config(model), options, log)


def test_train_resume_chat_and_merge_in_four_bits(model: Path, luthier: Run, tmp_path: Path) -> None:
    whole, cut = run_config(model, tmp_path / "whole"), run_config(model, tmp_path / "cut")
    summary = library.train(whole)
    assert summary["quantised"] == "nf4"
    assert summary["losses"][-1] < summary["losses"][0]
    assert (
        summary["parameters"]
        == sum(p.numel() for p in library.load_model(model)[0].parameters()) + (summary["trainable_parameters"])
    )
    stops = iter([False, False, True])
    with pytest.raises(Stopped):
        library.train(cut, stop=lambda: next(stops))
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
    # the base's original weights plus the update, not the 4-bit weights, which differ by a tenth
    torch.testing.assert_close(merged[name], base[name] + whole.lora.lora_alpha / whole.lora.r * (b @ a))


def test_the_name_of_the_copy_depends_on_the_model_and_the_format(
    model: Path, model_dir: Callable[[str], Path]
) -> None:
    config = read_config(model)
    own = cache_dir(model, config, NF4.how)
    others = {
        cache_dir(model, config, Quantisation("int8")),
        cache_dir(model, config, Quantisation("nf4", double=False)),
        cache_dir(model_dir("qwen2"), read_config(model_dir("qwen2")), NF4.how),
    }
    assert len({own, *others}) == 4


def test_a_full_disk_prevents_the_copy_but_not_the_run(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    messages: list[str] = []
    monkeypatch.setattr("luthier.models.quantized_loader.write_safetensors", full)
    assert load(model, messages.append) is not None
    assert "the quantised copy of the base cannot be saved ([Errno 28] No space left" in messages[-1]
    assert list(cache.iterdir()) == []


def test_a_killed_load_leaves_no_incomplete_copy(model: Path, cache: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from luthier.models import quantized_loader as q\n"
        "from luthier.models.directory import read_config; from luthier.models.quantization import Quantisation\n"
        "original = q.write_safetensors\n"
        "def write(*args): original(*args); os.kill(os.getpid(), 9)\n"
        "q.write_safetensors = write\n"
        "path = Path(sys.argv[1]); options = q.QuantisedOptions(Quantisation('nf4'), torch.float32)\n"
        "q.load_quantised(path, torch.float32, torch.device('cpu'), read_config(path), options)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, check=False)
    assert done.returncode == -9
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == []
    messages: list[str] = []
    load(model, messages.append)
    assert "saved the quantised copy in" in messages[-1]
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def test_the_cache_can_be_disabled(model: Path, cache: Path) -> None:
    load(model, options=QuantisedOptions(Quantisation("nf4"), torch.float32, cache=False))
    assert not cache.exists()


def test_the_library_reads_our_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.ones((), dtype=torch.bfloat16),
    }
    write_safetensors(tmp_path / "t.safetensors", tensors)
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[n], t) and read[n].dtype is t.dtype for n, t in tensors.items())


def test_kernels_are_never_downloaded(tmp_path: Path) -> None:
    """If the package ``kernels`` were visible, bitsandbytes would download code from a hub."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from luthier.models.quantization import bitsandbytes_functions; bitsandbytes_functions()\n"
        "import bitsandbytes.backends.cpu.ops; assert 'kernels' not in sys.modules; print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_a_missing_bitsandbytes_is_reported_with_a_fix(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization.bitsandbytes_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    try:
        with pytest.raises(MissingPackageError, match="a quantised base model requires the package bitsandbytes") as e:
            load(model)
        assert e.value.fix == install_command("qlora")
    finally:
        quantization.bitsandbytes_functions.cache_clear()


def test_eight_bit_optimizer_learns_and_resumes_bit_for_bit(model: Path, tmp_path: Path) -> None:
    lora = configs.LoraConfig(r=64)  # states of more than 4,096 values are stored in 8 bits
    both = (run_config(model, tmp_path / name, train={"optim": "adamw_8bit"}) for name in ("w", "c"))
    whole, cut = (config.model_copy(update={"lora": lora}) for config in both)
    losses = library.train(whole)["losses"]
    assert losses[-1] < losses[0]
    stops = iter([False, False, True])
    with pytest.raises(Stopped):
        library.train(cut, stop=lambda: next(stops))
    library.train(cut)
    adapters = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("w", "c")]
    assert adapters[0] == adapters[1]


def test_a_paged_optimizer_is_replaced_with_a_note(model: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    values = {"train": {"optim": "paged_adamw_32bit", "max_steps": 2}}
    library.train(run_config(model, tmp_path / "paged", **values), log=messages.append)
    assert any("adamw_torch is used instead" in m for m in messages)
    library.train(run_config(model, tmp_path / "plain", train={"max_steps": 2}))
    digests = [files.sha256(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("paged", "plain")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type would be ignored without model.load_in_4bit"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], words: str, model: Path) -> None:
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


def test_a_large_head_from_a_pickle_file_is_in_memory_only_once(tmp_path: Path) -> None:
    """Reading and normalising Baichuan2's head keeps neither the file's pages nor a second copy in memory."""
    torch.save({"head": torch.randn(100_000, 1024, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", _READ, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.75  # two copies would be 2; the allocator adds up to half a copy


def test_the_values_of_the_codes_are_those_of_bitsandbytes() -> None:
    functions, cpu = bitsandbytes_functions(), torch.device("cpu")
    for kind in ("nf4", "fp4"):
        assert torch.equal(quantization.code_table(kind, cpu), functions.get_4bit_type(kind, device="cpu"))
    assert torch.equal(quantization._nested_code(cpu), functions.create_dynamic_map())


def test_the_tensors_of_the_copy_are_mapped_and_aligned(model: Path, cache: Path) -> None:
    """Mapped tensors equal those that were read, are not shared with the file, and none is out of alignment."""
    load(model)
    (folder,) = cache.iterdir()
    shards = Shards.open(folder)
    for name in shards.shapes:
        place = shards.place(name)
        assert place and place.offset % place.dtype.itemsize == 0
        mapped, read = shards.mapped(name), shards.read(name)
        assert mapped.dtype is read.dtype and torch.equal(mapped, read)
    before = (folder / "part-00000.safetensors").read_bytes()
    shards.mapped(name).zero_()
    assert (folder / "part-00000.safetensors").read_bytes() == before


def test_a_tensor_that_is_converted_is_read_instead_of_mapped(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of its map would stay in memory beside the result."""
    load(model)
    names: list[str] = []
    mapped = Shards.mapped

    def recorded(shards: Shards, name: str) -> torch.Tensor:
        names.append(name)
        return mapped(shards, name)

    monkeypatch.setattr(Shards, "mapped", recorded)
    used = {}
    for dtype in (torch.float32, torch.bfloat16):
        load_quantised(model, dtype, torch.device("cpu"), read_config(model), QuantisedOptions(NF4.how, dtype))
        used[dtype] = set(names)
        names.clear()
    converted = {n for n in used[torch.float32] if "norm" in n or "embed" in n}  # the embedding is also the head
    assert len(converted) == 2 * 2 + 1 + 1
    assert used[torch.bfloat16] == used[torch.float32] - converted


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_copy_serves_every_dtype(model: Path, cache: Path, kind: Any) -> None:
    how = Quantisation(kind)
    loaded = {}
    for dtype in (torch.bfloat16, torch.float32):
        options = QuantisedOptions(how, dtype)
        loaded[dtype] = load_quantised(model, dtype, torch.device("cpu"), read_config(model), options)
    assert len(list(cache.iterdir())) == 1
    for name, tensor in loaded[torch.float32].state_dict().items():
        other = loaded[torch.bfloat16].state_dict()[name]
        if name.endswith(how.parts):
            assert torch.equal(tensor, other)
        elif tensor.is_floating_point() and "head" not in name:
            assert tensor.dtype is torch.float32 and other.dtype is torch.bfloat16
