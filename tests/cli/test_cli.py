"""Tests of the command line from a user's point of view."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import luthier as library
from luthier import __version__, personas
from luthier import config as configs
from luthier.cli.common import step_progress
from luthier.devices.device import pick_dtype
from luthier.models.directory import read_config
from luthier.models.loader import load_weights
from luthier.training.metrics import StepRecord
from luthier.verbs import doctor
from tests.conftest import ROOT, Result

Run = Callable[..., Result]
COMMAND = [sys.executable, "-m", "luthier.cli.main"]


def test_help_is_instant_and_imports_no_torch() -> None:
    def once() -> float:
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        for verb in ("demo", "pull", "init", "check", "train", "eval", "chat", "doctor"):
            assert f"\n  {verb} " in done.stdout
        return time.perf_counter() - start

    once()
    assert statistics.median(once() for _ in range(5)) < 0.3
    code = (
        "import sys; sys.argv = ['luthier', 'train', '--help']\n"
        "from luthier.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'luthier.config')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_version_is_printed(luthier: Run) -> None:
    assert luthier("--version").out == f"luthier {__version__}\n"


def test_every_verb_is_a_function_of_the_library() -> None:
    import luthier.training

    assert luthier.training
    for verb in ("demo", "pull", "init", "check", "train", "eval", "chat", "doctor"):
        assert callable(getattr(library, verb))
    assert set(library.__all__) <= set(dir(library))
    with pytest.raises(AttributeError):
        _ = library.nonsense


@pytest.fixture
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


def test_check_prints_counts_and_tokens(luthier: Run, model: Path) -> None:
    done = luthier("check", "--model", model, "--data", personas.TEAHOUSE, "--show", 2)
    assert done.code == 0
    assert "74 read, 74 kept, 0 dropped, 0 changed" in done.out
    assert "teahouse.zh.jsonl:2  (" in done.out
    assert "<|im_start|>|" in done.out
    assert "ready" in done.out


def test_check_json_is_one_object(luthier: Run, model: Path) -> None:
    done = luthier("check", "--model", model, "--data", personas.TEAHOUSE, "--json")
    report = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert report["rows"] == {"read": 74, "kept": 74, "dropped": 0, "changed": 0}
    assert report["problems"] == []
    assert report["tokens"]["total"] > report["tokens"]["supervised"] > 0


def test_check_json_reports_every_refused_row(luthier: Run, model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}, {"instrution": "a", "output": "b"}, {"instruction": "a"}]')
    done = luthier("check", "--model", model, "--data", rows, "--json")
    report = json.loads(done.out)
    assert done.code == 2
    assert report["rows"] == {"read": 3, "kept": 1, "dropped": 2, "changed": 0}
    assert [(p["file"], p["row"]) for p in report["problems"]] == [(str(rows), 2), (str(rows), 3)]
    assert "did you mean 'instruction'" in report["problems"][0]["reason"]
    assert "error: " in done.err
    assert "\n  fix: correct the rows, or pass --rename instrution=instruction" in done.err
    for argv in (["--model", model, "--data", tmp_path / "none.json"], ["--model", tmp_path, "--data", rows], []):
        done = luthier("check", *argv, "--json")
        assert done.code == 2
        assert not json.loads(done.out)["ok"]
        assert {"rows", "problems", "tokens"} <= json.loads(done.out).keys()


REFUSALS = [
    (
        ["check", "--model", "{model}", "--data", "{no}"],
        "does not exist",
        "choose a JSON, JSONL, CSV, TSV or Parquet file",
    ),
    (["check", "--model", "{no}", "--data", "{rows}"], "does not exist", "luthier pull smollm2-135m"),
    (["check", "--data", "{rows}"], "model: is missing", "give --model DIR"),
    (["train", "--model", "{model}", "--data", "{rows}"], "output_dir: is missing", "give --output-dir RUN"),
    (
        ["check", "--model", "{model}", "--data", "{rows}", "--set", "lora.target_modules=[q_attn, k_proj]"],
        "'q_attn' is not a module of a llama model; its linear layers are q_proj, k_proj",
        "leave target_modules out",
    ),
    (
        ["check", "--model", "{model}", "--data", "{rows}", "--set", "train.lr=1"],
        "train.lr: unknown key; did you mean train.learning_rate?",
        "write train.learning_rate",
    ),
    (
        ["train", "--model", "{model}", "--data", "{rows}", "--output-dir", "{rows}"],
        "cannot be used as a directory",
        "choose",
    ),
    (
        ["estimate", "--model", "{model}", "--data", "{rows}", "--length", "9"],
        "--length would be ignored",
        "leave it out",
    ),
    (["chat", "{no}", "--prompt", "a"], "does not exist", "luthier pull"),
    (["chat", "{model}", "--prompt", " "], "the prompt is empty", "--prompt TEXT"),
    (["chat", "{model}", "--json"], "needs a prompt", "--prompt TEXT"),
    (["chat", "{model}", "--prompt", "a", "--dtype", "int3"], "is not a dtype", "float32"),
    (["eval", "{model}", "--data", "{rows}", "--dtype", "int3"], "is not a dtype", "float32"),
    (["eval", "{no}", "--data", "{rows}"], "does not exist", "luthier pull"),
    (["eval", "{model}", "--data", "{rows}"], "no adapter to compare", "--model BASE --adapter DIR"),
    (["chat", "{model}", "--checkpoint", "3", "--prompt", "a"], "has no checkpoint 3", "leave --checkpoint out"),
    (["check", "--model", "{rows}", "--data", "{rows}"], "is a data file, not a model directory", "--data"),
    (["pull", "smolm2"], "model 'smolm2' is unknown", "luthier pull smollm2-135m"),
]


@pytest.mark.parametrize(("argv", "message", "fix"), REFUSALS)
def test_a_mistake_is_one_message_and_a_fix(
    argv: list[str], message: str, fix: str, luthier: Run, model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    names = {"model": model, "rows": rows, "no": tmp_path / "absent"}
    done = luthier(*(a.format(**names) for a in argv))
    assert done.code == 2
    lines = done.err.strip().splitlines()
    assert any(line.startswith("error: ") and message in line for line in lines)
    assert lines[-1].startswith("  fix: ")
    assert fix in lines[-1]
    assert "Traceback" not in done.err


def test_a_trained_run_can_be_used_with_chat(luthier: Run, model: Path, tmp_path: Path) -> None:
    """A tiny model memorises one exchange including the stop token; chat needs only the run's directory."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Who are you?", "output": "Marlow."}\n' * 8)
    run = tmp_path / "run"
    settings = ["train.max_steps=60", "train.learning_rate=1e-2", "data.system=Keep the lamp.", "model.dtype=float32"]
    argv = ["train", "--model", model, "--data", rows, "--output-dir", run]
    done = luthier(*argv, *(x for s in settings for x in ("--set", s)))
    assert done.code == 0
    assert "luthier chat" in done.out
    assert "step 60/60" in done.err
    for path in (run, run / "adapter"):
        reply = json.loads(luthier("chat", path, "--prompt", "Who are you?", "--json").out)
        assert reply["reply"] == "Marlow."
        assert reply["stopped"] is True
        assert reply["reply_tokens"] > 1
    printed = luthier("chat", run, "--prompt", "Who are you?")
    assert printed.out == "Marlow.\n"
    base = json.loads(luthier("chat", model, "--prompt", "Who are you?", "--json", "--max-new-tokens", 5).out)
    assert base["reply"] != "Marlow."
    assert base["stopped"] is False
    other = json.loads(luthier("chat", run, "--prompt", "Who are you?", "--system", "x" * 300, "--json").out)
    assert other["prompt_tokens"] > reply["prompt_tokens"]


def test_sampling_is_reproducible_by_its_seed(model: Path) -> None:
    chat = library.chat(model)
    warm = [chat.send("a", library.Sampling(8, temperature=1.0, seed=s)) for s in (1, 1, 2) if not chat.reset()]
    assert warm[0].text == warm[1].text != warm[2].text
    assert len({chat.send("a", library.Sampling(8)).text for _ in range(2) if not chat.reset()}) == 1


def test_streamed_text_is_the_reply(model: Path) -> None:
    chat = library.chat(model)
    parts: list[str] = []
    reply = chat.send("你好", library.Sampling(40), parts.append)
    assert "".join(parts) == reply.text
    assert [m.role for m in chat.history] == ["user", "assistant"]


def test_batched_replies_equal_single_replies(model: Path) -> None:
    """Left padding changes nothing: fp32, greedy, prompts of different lengths."""
    generator = library.chat(model).generator
    from luthier.types import Message

    prompts = [[Message("user", "a" * n)] for n in (1, 9, 40)]
    batched = generator.replies(prompts, library.Sampling(12))
    single = [generator.reply(p, library.Sampling(12)) for p in prompts]
    assert [r.text for r in batched] == [r.text for r in single]
    assert [r.stopped for r in batched] == [r.stopped for r in single]


def test_an_interactive_conversation(luthier: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "", "/reset", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    done = luthier("chat", model, "--max-new-tokens", 4)
    assert done.code == 0
    assert "(a new conversation)" in done.err
    assert done.err.count("cut at 4 tokens") == 2


def test_a_run_without_an_adapter_is_refused(luthier: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: x}\ndata: {train: y}\n")
    done = luthier("chat", tmp_path, "--prompt", "a")
    assert done.code == 2
    assert "has no adapter yet" in done.err


def test_chat_refuses_an_adapter_over_a_changed_base(
    luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    import shutil

    shutil.copytree(model_dir("llama"), base)
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    run = tmp_path / "run"
    assert (
        luthier("train", "--model", base, "--data", rows, "--output-dir", run, "--set", "train.max_steps=1").code == 0
    )
    altered = load_weights(base, torch.float32)
    with torch.no_grad():
        altered.model.embed_tokens.weight[0, 0] += 1
    altered.save_pretrained(base)
    done = luthier("chat", run, "--prompt", "a")
    assert done.code == 2
    assert "weights differ" in done.err
    shutil.rmtree(base)
    done = luthier("chat", run, "--prompt", "a")
    assert done.code == 2
    assert f"{base}: the base model of {run / 'adapter'} does not exist" in done.err


@pytest.mark.parametrize("fault", ["cut", "missing", "extra", "config", "remote", "tokenizer"])
def test_a_damaged_model_is_refused(fault: str, luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base)
    weights = base / "model.safetensors"
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif fault in ("missing", "extra"):
        tensors = load_file(weights)
        if fault == "missing":
            del tensors["model.norm.weight"]
        else:
            tensors["model.norm.extra"] = torch.zeros(1)
        save_file(tensors, weights, metadata={"format": "pt"})
    elif fault == "config":
        (base / "config.json").write_text("{")
    elif fault == "remote":
        (base / "config.json").write_text('{"model_type": "baichuan", "auto_map": {"AutoConfig": "x.py"}}')
    else:
        (base / "tokenizer.json").write_text("{}")
    done = luthier("chat", base, "--prompt", "a")
    assert done.code == 2
    assert done.err.startswith("error: ")
    if fault in ("missing", "extra"):
        assert f"model.norm.{'weight' if fault == 'missing' else 'extra'}" in done.err


def test_the_progress_bar_shows_a_loss_only_after_a_step(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with step_progress() as show:
        show(StepRecord(1, 2, 0.5, 1.25, 1.0, 1e-3, 10, 5, 0.1))
    before, shown, _ = capfd.readouterr().err.partition("loss 1.2500 100 tokens/s")
    assert shown and "training" in before and "loss" not in before and "nan" not in before


def test_doctor_prints_the_whole_version_of_torch(luthier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of an installed package may lack the part that names the build."""
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: "2.13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert json.loads(luthier("doctor", "--json").out)["packages"]["torch"] == "2.13.0+cu130"


def test_data_files_can_be_repeated(luthier: Run, model: Path) -> None:
    done = luthier("check", "--model", model, "--data", personas.TEAHOUSE, "--data", personas.HELD_OUT, "--json")
    assert json.loads(done.out)["rows"]["read"] == 98
    assert read_config(model).model_type == "llama"


def test_demo_compares_the_model_before_and_after(
    luthier: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a tiny random model instead of the embedded one, so that it runs everywhere."""
    monkeypatch.setattr("luthier.verbs.pull.pull", lambda *_, **__: model)
    done = luthier("demo", "--output-dir", tmp_path / "run")
    assert done.code == 0
    assert "Questions that were not in the training data" in done.out
    assert "held-out loss:" in done.out
    assert "of 24 after" in done.out
    assert (tmp_path / "run" / "adapter" / "luthier.json").is_file()
    again = luthier("demo", "--output-dir", tmp_path / "run")
    assert again.code == 0
    assert "finished already" in again.err


def test_init_writes_a_run_that_trains(luthier: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    argv = ["--model", model, "--data", personas.TEAHOUSE, "--output-dir", tmp_path / "run", "--to", file]
    assert luthier("init", *argv).code == 0
    text = file.read_text(encoding="utf-8")
    for key in configs.all_keys():
        assert f"{key.rpartition('.')[2]}: " in text
        assert configs.describe(key) in text
    again = luthier("init", *argv)
    assert again.code == 2
    assert "already exists" in again.err
    assert json.loads(luthier("check", file, "--json").out)["ok"] is True
    estimates = [
        json.loads(luthier("estimate", *argv, "--json").out)["chosen"]["activations_bytes"]
        for argv in ((file,), ("--model", model, "--data", personas.TEAHOUSE), ("--model", model))
    ]
    assert estimates[0] == estimates[1] != estimates[2]  # the rows of the file are used
    assert luthier("train", file, "--set", "train.max_steps=2").code == 0
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["losses"]) == 2
    other = luthier("train", file)
    assert other.code == 2
    assert "train.max_steps: 2 -> None" in other.err


def test_doctor_tries_a_step(luthier: Run) -> None:
    report = json.loads(luthier("doctor", "--json").out)
    assert report["smoke"]["ok"] is True
    assert report["packages"]["torch"] == torch.__version__
    assert "one step  works" in luthier("doctor").out
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    del extras["dev"], extras["docs"]  # of no use to users
    assert {n: {re.split("[><=]", p)[0] for p in extra} for n, extra in extras.items()} == {
        n: set(packages) for n, packages in doctor.EXTRAS.items()
    }


@pytest.mark.smollm2
def test_twenty_steps_on_huanhuan_and_the_first_within_15_seconds(
    smollm2: Path, huanhuan: Path, luthier: Run, tmp_path: Path
) -> None:
    report = json.loads(luthier("check", "--model", smollm2, "--data", huanhuan, "--json").out)
    assert report["rows"]["read"] == report["rows"]["kept"] == 3729
    settings = ["train.max_steps=20", "train.gradient_accumulation_steps=1", "train.learning_rate=1e-3"]
    argv = ["train", "--model", str(smollm2), "--data", str(huanhuan), "--output-dir", str(tmp_path / "run")]
    start = time.perf_counter()
    command = [*COMMAND, *argv, *(x for s in settings for x in ("--set", s))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        first = next(time.perf_counter() - start for line in process.stderr if line.startswith("step 1/"))
        process.stderr.read()
    assert process.returncode == 0
    losses = json.loads((tmp_path / "run" / "summary.json").read_text())["losses"]
    assert len(losses) == 20
    assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.1
    # 15 s is promised for CPUs that compute in bfloat16; others need twice as long for the step itself
    assert first < (15 if pick_dtype("auto", torch.device("cpu")) is torch.bfloat16 else 45)
