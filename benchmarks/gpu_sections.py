"""The sections of ``verify_gpu.py``: each returns what it measured, and the checks that failed under ``failed``."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import luthier
from luthier import personas
from luthier.adapters.run_dir import Summary
from luthier.batching.collate import collate, to_device
from luthier.config import LoraConfig
from luthier.devices.device import deterministic, pick_device
from luthier.kernels.dropout import DropoutState, dropout, keep
from luthier.lora.layers import attach, resolve, share_dropout_state
from luthier.models.quantization import Quantisation, dequantise, quantise
from luthier.training.forward import loss_sum, segment_attention
from luthier.types import Example

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizer"
QUESTIONS = ("What should I have?", "今天喝什么茶？", "Who are you?")
DEFAULTS: dict[str, Any] = {
    "train.max_steps": 60,
    "train.learning_rate": 5e-3,
    "train.save_steps": 10,
    "train.eval_time_ratio": 1,
    "data.max_length": 256,
    "data.eval_fraction": 0.1,
    "lora.lora_dropout": 0.1,
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the verification. seconds: its time limit; gpu_only: needs the memory or the speed of a GPU."""

    run: Callable[[Path], dict[str, Any]]
    seconds: int
    gpu_only: bool = False


def facts(_: Path) -> dict[str, Any]:
    """Name the device and the libraries, and measure the limits: copy bandwidth and matrix products."""
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "failed": []}
    if pick_device().type != "cuda":
        return result
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = _cuda_seconds(lambda: target.copy_(source))
    product = _cuda_seconds(lambda: a @ b)
    return {
        **result,
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "memory_gb": round(total / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9),
        "bf16_tflops": round(2 * 8192**3 / product / 1e12),
    }


def _cuda_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        work()
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / repeats


def laws(folder: Path) -> dict[str, Any]:
    """Compare loss and adapter gradients on this device with those on the CPU in fp32; dropout masks bit by bit."""
    model_dir = small_model(folder)
    device, errors = pick_device(), dict[str, float]()
    generator = torch.Generator().manual_seed(0)
    rows = [_random_row(generator, n) for n in (40, 25, 33, 60)]
    rows += [replace(rows[0], ids=rows[0].ids.copy())]
    expected = _loss_and_gradients(model_dir, rows, torch.device("cpu"), torch.float32)
    bad = list[str]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = _loss_and_gradients(model_dir, rows, torch.device("cpu"), dtype)
        limit = 1e-4 if dtype is torch.float32 else 1.5 * _largest(map(_distance, own, expected))  # its own rounding
        for kernel in ("padded", "looped", "reference"):
            result = _loss_and_gradients(model_dir, rows, device, dtype, kernel)
            name = f"{kernel} {str(dtype).removeprefix('torch.')}"
            errors[name] = _largest(map(_distance, result, expected))
            bad += [name] * (not errors[name] <= limit)
    x, key = torch.randn(64, 256, generator=generator), DropoutState().key(3)
    mask = keep(key, 64, 256, 0.1)
    same_mask = all(torch.equal(dropout(x.to(d), 0.1, key).cpu() != 0, mask) for d in (device, torch.device("cpu")))
    codes, values = _nf4_differences(torch.randn(2048, 1024, generator=generator), device)
    return {
        "errors": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "dropout_masks_equal": same_mask,
        "nf4_codes_that_differ": codes,
        "nf4_values_differ_by": values,
        "failed": bad + ["dropout masks"] * (not same_mask) + ["nf4"] * (not (codes <= 1e-4 and values <= 1e-6)),
    }


def _nf4_differences(weight: Tensor, device: torch.device) -> tuple[float, float]:
    """Compare nf4 on this device with the CPU: the fraction of packed codes, and the values of the same codes."""
    how, shape = Quantisation("nf4"), (weight.shape[0], weight.shape[1])
    here, on_cpu = quantise(weight.to(device), how), quantise(weight, how)
    codes = float((here["packed"].cpu() != on_cpu["packed"]).float().mean())
    moved = {name: part.to(device) for name, part in on_cpu.items()}
    values = dequantise(moved, how, shape, torch.float32).cpu() - dequantise(on_cpu, how, shape, torch.float32)
    return codes, float(values.abs().max())


def _random_row(generator: torch.Generator, length: int) -> Example:
    ids = torch.randint(3, 600, (length,), generator=generator, dtype=torch.int64).numpy()
    trained = torch.arange(length).numpy() >= length // 3
    return Example(ids, trained, None)  # type: ignore[arg-type]


def _loss_and_gradients(
    model_dir: Path, rows: list[Example], device: torch.device, dtype: torch.dtype, kernel: str = "reference"
) -> list[Tensor]:
    """Return the loss and the gradient of every adapter matrix, with dropout 0.1, as fp32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).train()
    layers = attach(model, LoraConfig.model_validate({"r": 4, "lora_dropout": 0.1}), resolve(model, None), seed=0)
    share_dropout_state(layers)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator).to(device) * 0.05
    with deterministic(device), segment_attention(model, kernel):
        loss = loss_sum(model, to_device(collate(rows, share=False), device))
        parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
        gradients = torch.autograd.grad(loss, parameters)
    return [loss.detach().float().cpu(), *(g.float().cpu() for g in gradients)]


def _largest(errors: Iterable[float]) -> float:
    """Return the largest error; infinity if one is not a number, which ``max`` could miss."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def training(folder: Path) -> dict[str, Any]:
    """Train twice, and once with a SIGKILL and a resume: all three adapters must be equal byte for byte."""
    model = small_model(folder)
    killed = _kill_when_saved(model, folder / "killed")
    printed = list[str]()
    summary = _train(model, folder / "straight")
    _train(model, folder / "again")
    _train(model, folder / "killed", report=printed.append)
    straight, again, resumed = (
        (folder / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("straight", "again", "killed")
    )
    losses: Any = summary["losses"]
    held_out: Any = summary["held_out"]
    checks = {
        "not killed": killed,
        "two runs differ": straight == again,
        "not resumed": any("resuming after step" in line for line in printed),
        "the resumed run differs": straight == resumed,
        "the loss does not fall": losses[-1] < 0.85 * losses[0],
    }
    return {
        **{key: summary[key] for key in ("device", "dtype", "tokens_per_s")},
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
        "held_out": {side: round(held_out[side]["loss"], 3) for side in ("base", "tuned")},
        "failed": [name for name, passed in checks.items() if not passed],
    }


def using(folder: Path) -> dict[str, Any]:
    """Chat, evaluate, merge: greedy replies on this device must equal those on the CPU in fp32."""
    model, run = small_model(folder), folder / "run"
    _train(model, run, {"model.dtype": "float32"})
    here = replies(run)
    scores = luthier.eval(run)
    merged = luthier.merge(run, folder / "merged")
    again = replies(folder / "merged")
    command = [sys.executable, str(ROOT / "benchmarks" / "verify_gpu.py"), "--replies-of", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(visible=False))
    checks = {
        "replies differ from the CPU's": here == json.loads(done.stdout.splitlines()[-1]),
        "replies of the merged model differ": here == again,
    }
    return {
        "replies": here,
        "merge": merged.closeness.summary(),
        "held_out": round(scores.tuned.held_out.loss, 3) if scores.tuned.held_out else None,
        "failed": [name for name, passed in checks.items() if not passed],
    }


def replies(model: Path) -> list[str]:
    """Return greedy replies in fp32; short ones, since a near tie between two tokens changes all that follow."""
    chat = luthier.chat(model, dtype="float32", sampling={"temperature": 0, "max_new_tokens": 24})
    replies = []
    for question in QUESTIONS:
        chat.reset()
        replies.append(chat.send(question).text)
    return replies


def qlora(folder: Path) -> dict[str, Any]:
    """Train with a 4-bit and an 8-bit base, and chat with the results."""
    model, failed, losses = small_model(folder), list[str](), dict[str, list[float]]()
    for key in ("load_in_4bit", "load_in_8bit"):
        summary: Any = _train(model, folder / key, {f"model.{key}": True})
        losses[key] = [round(summary["losses"][0], 3), round(summary["losses"][-1], 3)]
        failed += [f"{key}: the loss does not fall"] * (not losses[key][1] < 0.85 * losses[key][0])
        luthier.chat(folder / key).send(QUESTIONS[0])
    return {"losses": losses, "failed": failed}


def yi_6b(folder: Path) -> dict[str, Any]:
    """Train LoRA in bf16 on random weights of Yi-6B's shape."""
    return _published_shape(folder, "yi-6b", {})


def deepseek_7b_nf4(folder: Path) -> dict[str, Any]:
    """Train QLoRA in nf4 on random weights of DeepSeek-7B's shape."""
    return _published_shape(folder, "deepseek-7b", {"model.load_in_4bit": True})


def _published_shape(folder: Path, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    model, result, start = folder / "model", dict[str, Any](), time.monotonic()
    program = [sys.executable, str(ROOT / "benchmarks" / "stress.py"), "--family", family, "--output-dir", str(model)]
    subprocess.run(program, stdout=subprocess.DEVNULL, check=True, env=environment())
    result["seconds_writing_weights"] = round(time.monotonic() - start)
    size = {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2, "train.max_steps": 8}
    rest = {"train.eval_time_ratio": 0, "train.save_steps": 1000, "train.learning_rate": 1e-4, "data.eval_fraction": 0}
    for rate in (0.0, 0.1):
        torch.cuda.reset_peak_memory_stats()
        began, printed = time.monotonic(), list[str]()
        run = folder / f"dropout-{rate}"
        options = {**size, **rest, **settings, "lora.lora_dropout": rate, "data.train": [str(personas.TRAIN)]}
        summary: Any = _train(model, run, options, report=printed.append)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        result[f"dropout {rate}"] = {
            "tokens_per_s": summary["tokens_per_s"],
            "finite": len(steps) == 8 and all(math.isfinite(s["loss"]) for s in steps),
            "last_step_tokens_per_s": round(steps[-1]["tokens"] / steps[-1]["seconds"]),
            "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "peak_rss_gb": round(summary["peak_rss_bytes"] / 1e9, 2),
            "command_seconds": round(time.monotonic() - began),
            "estimate": printed[0] if printed else "",
        }
    bad = [name for name, r in result.items() if isinstance(r, dict) and not r["finite"]]
    return {**result, "failed": [f"{name}: a loss is not finite" for name in bad]}


SECTIONS: dict[str, Section] = {
    "facts": Section(facts, 60),
    "laws": Section(laws, 90),
    "training": Section(training, 120),
    "using": Section(using, 120),
    "qlora": Section(qlora, 120),
    "yi-6b": Section(yi_6b, 150, gpu_only=True),
    "deepseek-7b-nf4": Section(deepseek_7b_nf4, 150, gpu_only=True),
}


def small_model(folder: Path) -> Path:
    """Write a small random chat model with the test tokenizer."""
    path = folder / "model"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1)
    model.save_pretrained(path)
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    return path


def _train(
    model: Path, run: Path, settings: dict[str, Any] | None = None, report: Callable[[str], None] = lambda _: None
) -> Summary:
    """Train on the shipped rows with few steps; settings override the defaults by key."""
    values = {"model": {"path": model}, "data": {"train": personas.TEAHOUSE}, "output_dir": run}
    return luthier.train(luthier.build(values, {**DEFAULTS, **(settings or {})}), log=report)


def _kill_when_saved(model: Path, run: Path) -> bool:
    """Start a run in a process of its own, and kill it when it has saved a checkpoint but not its adapter."""
    settings = [option for key, value in DEFAULTS.items() for option in ("--set", f"{key}={value}")]
    files = ["--model", str(model), "--data", str(personas.TEAHOUSE), "--output-dir", str(run)]
    command = [sys.executable, "-m", "luthier", "train", *files, *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any((run / "checkpoints").glob("step-*[0-9]")) and not (run / "adapter").exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.01)
    process.kill()
    return False


def environment(visible: bool = True) -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    hidden = {} if visible else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", **hidden}


def last_lines(done: subprocess.CompletedProcess[str] | str) -> str:
    text = done if isinstance(done, str) else done.stdout + done.stderr
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:]
