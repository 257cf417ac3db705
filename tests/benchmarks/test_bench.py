"""``make bench`` in a quick form on a tiny model; the real sizes and limits are in the slow tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import bench
import check
import linear
import machine
import recipe
import startup
import tuned
import workload
from luthier import personas
from luthier.config import TrainConfig
from luthier.encoding.store import ExampleStore
from luthier.errors import UserError
from tests.conftest import SHARED

HUANHUAN = SHARED / "data" / "huanhuan.json"
DATA = HUANHUAN if HUANHUAN.exists() else personas.TRAIN


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Children run in this process; returns what each was started with."""
    modules = {"recipe": recipe, "tuned": tuned, "machine": machine}
    started: list[list[str]] = []

    def child(module: str, arguments: Any) -> dict[str, Any]:
        started.append([module, *map(str, arguments)])
        monkeypatch.setattr("sys.argv", started[-1])
        capsys.readouterr()
        modules[module].main()  # type: ignore[attr-defined]
        return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))

    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(linear, "child", child)
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    return started


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_both_sides_train_the_same_rows_and_the_page_says_it(
    model_dir: Callable[[str], Path],
    here: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = [tmp_path / "bench.json", tmp_path / "bench.md"]
    options = ["--rows", "20", "--repeats", "1", "--dropout", "0", "--dtype", "fp32", "--model", model_dir("llama")]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, options), "--json", str(to[0]), "--markdown", str(to[1])])
    bench.main()
    found = json.loads(to[0].read_text(encoding="utf-8"))
    given, fastest, ours = (found["runs"][f"{name}, dropout 0"][0] for name in (bench.GIVEN, bench.FASTEST, bench.OURS))
    assert len(ours["losses"]) == len(given["losses"]) == 2
    assert given["tokens"] == fastest["tokens"]
    assert given["tokens"] - ours["tokens"] == 20  # the newline after the stop token, which nothing predicts
    assert given["supervised_tokens"] - ours["supervised_tokens"] == 20
    ratio = found["ratios"]["dropout 0.0"]["speed against its fastest setting"]
    assert ratio == pytest.approx(fastest["train_seconds"] / ours["train_seconds"], rel=0.02)
    assert [s[0] for s in here] == ["recipe", "recipe", "tuned", "machine"]
    assert ("--gradient-checkpointing" in here[0]) and ("--gradient-checkpointing" not in here[1])
    page = to[1].read_text(encoding="utf-8")
    assert "the first 20 rows of the shipped persona" in page
    assert f"| {bench.OURS}, dropout 0 | {ours['tokens_per_s']:.0f} |" in page
    assert f"| {ratio:g} |" in page
    assert found["machine"]["torch"] in page
    assert found["limit"]["tokens_per_s"] > 0


def test_the_recipe_is_the_tutorials_function(smollm2: Path) -> None:
    """Where the tutorials' own script is at hand, its function for a row gives the same ids and labels."""
    script = SHARED / "bench" / "tutorial_recipe.py"
    if not script.exists() or not HUANHUAN.exists():
        pytest.skip("shared/bench is not beside the project")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = script.read_text(encoding="utf-8")
    function = text[text.index("    def encode(row") : text.index("    rows = json.load")]
    names: dict[str, Any] = {"SYSTEM": workload.SYSTEM, "tokenizer": tokenizer}
    names["a"] = type("a", (), {"max_length": workload.MAX_LENGTH})
    exec("if True:\n" + function, names)
    for row in json.loads(HUANHUAN.read_text(encoding="utf-8"))[:50]:
        assert recipe.encode(tokenizer, row) == names["encode"](row)


def test_every_switch_of_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(TrainConfig):
        fused: bool = Field(True, description="x")
        compile: bool | str = Field("auto", description="x")

    monkeypatch.setattr(tuned, "TrainConfig", More)
    found = tuned.switches()
    assert {"train.fused=false", "train.compile=false"} <= set(found)
    assert not [f for f in found if "checkpointing" in f or "seed" in f]
    work = workload.Workload(Path("m"), Path("r"), "fp32")
    assert f"{bench.OURS}, train.fused=false, dropout 0.1" in bench._variants(work, [0.1], True) or found == []


def test_the_limit_counts_the_shared_prefix_once(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = model_dir("llama"), workload.write_rows(tmp_path / "rows.json", None, 20)
    assert machine.limit(model, rows, "fp32")["flops"] > 1e6
    monkeypatch.setattr(machine, "_per_position", lambda *_: 1e-6)
    counted = machine.limit(model, rows, "fp32")["tokens_per_s"]
    monkeypatch.setattr(ExampleStore, "common", lambda *_: 0)
    assert machine.limit(model, rows, "fp32")["tokens_per_s"] < counted


def test_rows_are_the_first_of_a_file_or_the_personas_over_and_over(tmp_path: Path) -> None:
    rows = json.loads(workload.write_rows(tmp_path / "a.json", None, 300).read_text(encoding="utf-8"))
    persona = [json.loads(line) for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()]
    for row, given in zip(rows, [*persona, *persona], strict=False):
        assert row["instruction"] == "\n".join(t for t in (given["instruction"], given["input"]) if t)
        assert row["output"] == given["output"]
    assert len(rows) == 300
    few = json.loads(workload.write_rows(tmp_path / "b.json", personas.TEAHOUSE, 3).read_text(encoding="utf-8"))
    assert [r["output"] for r in few] == [
        json.loads(line)["output"] for line in personas.TEAHOUSE.read_text(encoding="utf-8").splitlines()[:3]
    ]
    with pytest.raises(UserError, match="rows, 100000 are wanted"):
        workload.write_rows(tmp_path / "c.json", personas.TEAHOUSE, 100_000)


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        with monkeypatch.context() as m:
            m.setattr("sys.argv", ["bench", *options])
            with pytest.raises(SystemExit) as e:
                bench.main()
        assert e.value.code == 2
        return capsys.readouterr().err

    assert "the model to train is not there" in refused("--model", str(tmp_path / "none"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    text = refused()
    assert "the baseline needs the package datasets and peft" in text
    assert "pip install 'luthier[bench]'" in text


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(UserError, match=r"benchmarks/tuned\.py ended with code 2 .*--model"):
        workload.child("tuned", [])
    with pytest.raises(UserError, match="a side of the comparison failed: .*mistake"):
        check._python("raise SystemExit('a mistake')")


def test_a_run_that_takes_no_step_is_said(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match="luthier train took no step: .*no row can be used"):
        startup._once(model_dir("llama"), bad, tmp_path / "run", "s", [])


@pytest.mark.parametrize("distinct", [False, True])
def test_rows_for_check_repeat_with_an_index(distinct: bool, tmp_path: Path) -> None:
    check.write(tmp_path / "a.jsonl", personas.TEAHOUSE, 500, distinct)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["index"] for r in rows] == list(range(500))
    assert (len({r["output"] for r in rows}) == 500) == distinct


# --- the real sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.smollm2
def test_check_is_three_times_as_fast_as_the_tutorials_map(smollm2: Path) -> None:
    """A million rows, the prompt prefix of every one proven, the command's start included."""
    found = check.measure(smollm2, DATA, 1_000_000, 30_000, distinct=False)
    print(json.dumps(found))
    assert found["rows"]["kept"] == found["rows"]["read"] == 1_000_000
    assert found["ratio"] >= 3
    assert found["peak_rss_bytes"] < 1e9


@pytest.mark.slow
@pytest.mark.smollm2
def test_cost_does_not_depend_on_the_files_size(smollm2: Path) -> None:
    found = linear.measure(smollm2, DATA, [1_000, 100_000], ["train.max_steps=60"])
    print(json.dumps(found))
    assert found["tokens_per_s"] == pytest.approx(1, abs=0.1)
    assert found["peak_rss"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.smollm2
def test_training_is_many_times_as_fast_as_the_tutorials_recipe(smollm2: Path, tmp_path: Path) -> None:
    """What the README says of a processor with AMX; elsewhere it is measured, and not held to these figures."""
    command = [sys.executable, "-m", "luthier.bench", "--model", smollm2, "--data", DATA, "--json", tmp_path / "b.json"]
    done = subprocess.run([*map(str, command), "--rows", "80", "--repeats", "1"], check=False)
    assert done.returncode == 0
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    print(json.dumps(found["ratios"]), found["limit"])
    if "amx_bf16" not in found["machine"]["instructions"]:
        pytest.skip("this processor has no AMX")
    dropped, plain = found["ratios"]["dropout 0.1"], found["ratios"]["dropout 0.0"]
    assert dropped["speed against the recipe as given"] >= 12
    assert plain["speed against the recipe as given"] >= 5
    assert plain["speed against its fastest setting"] >= 4.5
    assert plain["speed against LLaMA-Factory (by its ratio)"] >= 3
    assert plain["memory against its fastest setting"] <= 0.5


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("rows", [1, 4])
def test_sixty_steps_take_no_longer_than_without_any_of_it(rows: int, smollm2: Path, tmp_path: Path) -> None:
    """The whole command, its first time on a machine: nothing is compiled, encoded or calibrated yet."""
    wanted = ["train.max_steps=60", f"train.per_device_train_batch_size={rows}", "train.gradient_accumulation_steps=1"]
    seconds = {}
    for name, settings in {
        "with": [],
        "without": [*tuned.switches(), "train.micro_batch_tokens=0", "data.cache=false"],
    }.items():
        command = workload.train_command(smollm2, DATA, tmp_path / name, [*wanted, *settings])
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / f"cache-{name}")},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds[name] = round(time.perf_counter() - start, 1)
        assert done.returncode == 0, done.stderr
    print(json.dumps({"rows": rows, **seconds}))
    assert seconds["with"] <= seconds["without"]


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_first_step_comes_soon(smollm2: Path) -> None:
    found = startup.measure(smollm2, DATA, 2, [])
    print(json.dumps(found))
    assert found["warm_until_first_step"] <= 8
    assert found["cold_until_first_step"] <= 10


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_command_measures_and_writes(smollm2: Path, tmp_path: Path) -> None:
    options = ["--model", smollm2, "--rows", 16, "--repeats", 1, "--dropout", 0, "--json", tmp_path / "b.json"]
    command = [sys.executable, "-m", "luthier.bench", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    print(done.stdout)
    assert found["ratios"]["dropout 0.0"]["speed against its fastest setting"] > 1
