"""Golden files record what users and other programs rely on: options, keys of every file of a run, an old run.

After an intended change, delete a golden file, run the test to write it again, and review the difference.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import luthier
from luthier.cli.main import app
from tests.conftest import ROOT, TOKENIZER, teahouse

GOLDEN = ROOT / "tests" / "golden"
OLD = GOLDEN / "run"


def same_as_golden(name: str, lines: list[str]) -> None:
    file = GOLDEN / name
    if not file.exists():
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pytest.fail(f"{file} was written: review it, then commit it")
    assert lines == file.read_text(encoding="utf-8").splitlines()


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a JSON object; for a list, those of its first element."""
    if isinstance(value, dict):
        for key, inner in value.items():
            label = key if "/" not in key else "FILE"
            yield f"{prefix}{label}"
            yield from keys(inner, f"{prefix}{label}.")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys(value[0], f"{prefix}[].")


def test_the_options_of_every_command() -> None:
    lines = []
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in verb.params:
            options = " ".join([*parameter.opts, *parameter.secondary_opts])
            default = str(parameter.default) if isinstance(parameter.default, Path) else repr(parameter.default)
            required = ", required" if parameter.required else ""
            lines.append(f"{name} {options} {parameter.metavar}, default {default}{required}")
    same_as_golden("options.txt", lines)


def test_the_keys_of_every_file_that_a_run_writes(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    luthier.train(teahouse(model_dir("llama"), run, {"eval_fraction": 0.2}))
    state = next((run / "checkpoints").iterdir()) / "state.json"
    files = {
        "summary.json": json.loads((run / "summary.json").read_text(encoding="utf-8")),
        "metrics.jsonl": json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]),
        "data-report.json": json.loads((run / "data-report.json").read_text(encoding="utf-8")),
        "evaluation.json": json.loads((run / "evaluation.json").read_text(encoding="utf-8")),
        "adapter/adapter_config.json": json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8")),
        "adapter/luthier.json": json.loads((run / "adapter/luthier.json").read_text(encoding="utf-8")),
        "checkpoints/*/state.json": json.loads(state.read_text(encoding="utf-8")),
    }
    names = sorted(re.sub("step-[0-9]+", "*", str(p.relative_to(run))) for p in run.rglob("*") if p.is_file())
    lines = [f"{name}: {key}" for name, value in files.items() for key in keys(value)]
    same_as_golden("files.txt", [*dict.fromkeys(names), "", *lines])


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Copy the run that ``tests/helpers/make_golden_run.py`` wrote."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    shutil.copytree(TOKENIZER, tmp_path / "model", dirs_exist_ok=True)
    run = tmp_path / "run"
    for name in ("adapter", "checkpoints", "run.yaml"):
        (run / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(run / name)
    for file in (run / "run.yaml", run / "adapter" / "adapter_config.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("@", str(tmp_path)), encoding="utf-8")
    return run


def test_an_adapter_written_by_an_earlier_version_is_read(old_run: Path) -> None:
    expected = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
    reply = luthier.chat(old_run, sampling={"max_new_tokens": 20}).send("What is 2 and 2?")
    assert reply.prompt_tokens == expected["prompt_tokens"]
    assert expected["reply"].startswith(reply.text) and len(reply.text) == 20


def test_a_checkpoint_written_by_an_earlier_version_is_resumed(old_run: Path) -> None:
    """If the format of checkpoints changes, this must expect an error instead."""
    shutil.rmtree(old_run / "adapter")
    messages: list[str] = []
    summary = luthier.train(luthier.load(old_run / "run.yaml"), log=messages.append)
    expected = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
    assert "resuming after step 2" in messages
    assert summary["losses"] == pytest.approx(expected["losses"], abs=1e-4)
