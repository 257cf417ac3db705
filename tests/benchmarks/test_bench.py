"""``make bench`` in a quick form on a tiny model; slow tests use the real sizes and limits."""

from __future__ import annotations

import json
import os
import shutil
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
import versions
import workload
from luthier import personas
from luthier._util.installation import install_command
from luthier.config import TrainConfig
from luthier.encoding.store import ExampleStore
from luthier.errors import UserError
from tests.conftest import ROOT, SHARED

HUANHUAN = SHARED / "data" / "huanhuan.json"
DATA = HUANHUAN if HUANHUAN.exists() else personas.TRAIN


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Run child processes in this process instead; return the arguments of each."""
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
def test_both_sides_train_the_same_rows_and_the_page_reports_it(
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
    results = json.loads(to[0].read_text(encoding="utf-8"))
    as_given, fastest, ours = (
        results["runs"][f"{name}, dropout 0"][0] for name in (bench.PUBLISHED, bench.FASTEST, bench.OURS)
    )
    assert len(ours["losses"]) == len(as_given["losses"]) == 2
    assert as_given["tokens"] == fastest["tokens"]
    assert as_given["tokens"] - ours["tokens"] == 20  # the newline after the stop token, which luthier does not train
    assert as_given["supervised_tokens"] - ours["supervised_tokens"] == 20
    ratio = results["ratios"]["dropout 0.0"]["speed against its fastest setting"]
    assert ratio == pytest.approx(fastest["train_seconds"] / ours["train_seconds"], rel=0.02)
    assert [s[0] for s in here] == ["recipe", "recipe", "tuned", "machine"]
    assert ("--gradient-checkpointing" in here[0]) and ("--gradient-checkpointing" not in here[1])
    page = to[1].read_text(encoding="utf-8")
    assert "the first 20 rows of the shipped persona" in page
    assert f"| {bench.OURS}, dropout 0 | {ours['tokens_per_s']:.0f} |" in page
    assert f"| {ratio:g} |" in page
    assert results["machine"]["torch"] in page
    assert results["limit"]["tokens_per_s"] > 0


def test_the_recipe_is_the_tutorials_function(smollm2: Path) -> None:
    """If the tutorials' own script is available, its function for one row gives the same ids and labels."""
    script = SHARED / "bench" / "tutorial_recipe.py"
    if not script.exists() or not HUANHUAN.exists():
        pytest.skip("shared/bench does not exist beside the project")
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
    results = tuned.switches()
    assert {"train.fused=false", "train.compile=false"} <= set(results)
    assert not [f for f in results if "checkpointing" in f or "seed" in f]
    work = workload.Workload(Path("m"), Path("r"), "fp32")
    assert f"{bench.OURS}, train.fused=false, dropout 0.1" in bench._variants(work, [0.1], True) or results == []


def test_the_limit_counts_a_shared_prefix_once(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = model_dir("llama"), workload.write_rows(tmp_path / "rows.json", None, 20)
    assert machine.limit(model, rows, "fp32")["flops"] > 1e6
    monkeypatch.setattr(machine, "_per_position", lambda *_: 1e-6)
    counted = machine.limit(model, rows, "fp32")["tokens_per_s"]
    monkeypatch.setattr(ExampleStore, "common", lambda *_: 0)
    assert machine.limit(model, rows, "fp32")["tokens_per_s"] < counted


def test_rows_are_the_first_of_a_file_or_the_personas_repeated(tmp_path: Path) -> None:
    rows = json.loads(workload.write_rows(tmp_path / "a.json", None, 300).read_text(encoding="utf-8"))
    persona = [json.loads(line) for line in personas.TRAIN.read_text(encoding="utf-8").splitlines()]
    for row, as_given in zip(rows, [*persona, *persona], strict=False):
        assert row["instruction"] == "\n".join(t for t in (as_given["instruction"], as_given["input"]) if t)
        assert row["output"] == as_given["output"]
    assert len(rows) == 300
    few = json.loads(workload.write_rows(tmp_path / "b.json", personas.TEAHOUSE, 3).read_text(encoding="utf-8"))
    assert [r["output"] for r in few] == [
        json.loads(line)["output"] for line in personas.TEAHOUSE.read_text(encoding="utf-8").splitlines()[:3]
    ]
    with pytest.raises(UserError, match="rows, 100000 were requested"):
        workload.write_rows(tmp_path / "c.json", personas.TEAHOUSE, 100_000)


def test_missing_models_and_packages_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        with monkeypatch.context() as m:
            m.setattr("sys.argv", ["bench", *options])
            with pytest.raises(SystemExit) as e:
                bench.main()
        assert e.value.code == 2
        return capsys.readouterr().err

    assert "the model to train does not exist" in refused("--model", str(tmp_path / "none"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    text = refused()
    assert "the baseline needs the package datasets and peft" in text
    assert install_command("bench") in text


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(UserError, match=r"benchmarks/tuned\.py failed with exit code 2 .*--model"):
        workload.child("tuned", [])
    with pytest.raises(UserError, match="one side of the comparison failed: .*mistake"):
        check._python("raise SystemExit('a mistake')")


def test_a_run_that_takes_no_step_is_reported(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match="luthier train took no step: .*no row can be used"):
        startup._train(model_dir("llama"), bad, tmp_path / "run", "s", [], os.environ)


@pytest.mark.parametrize("distinct", [False, True])
def test_rows_for_check_are_repeated_with_an_index(distinct: bool, tmp_path: Path) -> None:
    check.write(tmp_path / "a.jsonl", personas.TEAHOUSE, 500, distinct)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["index"] for r in rows] == list(range(500))
    assert (len({r["output"] for r in rows}) == 500) == distinct


# --- the real sizes ---------------------------------------------------------------------------------------------------


def test_two_versions_compute_their_steps_in_alternation(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    slower = tmp_path / "slower" / "src" / "luthier"
    shutil.copytree(ROOT / "src" / "luthier", slower)
    loop = slower / "training" / "loop.py"
    loop.write_text(
        loop.read_text().replace(
            "        rate = learning_rate(", "        time.sleep(0.2)\n        rate = learning_rate("
        )
    )
    settings = ["model.dtype=float32", "train.fused=false"]
    trees = (ROOT, slower.parent.parent)
    results = versions.compare(trees, model_dir("llama"), personas.TEAHOUSE, 4, settings)
    assert results["equal_losses"] and results["median"] > 2 and results["seconds"][1] > 0.8
    with pytest.raises(UserError, match="ended before its last step"):
        versions.compare(trees, tmp_path / "none", personas.TEAHOUSE, 1, [])


@pytest.mark.slow
@pytest.mark.smollm2
def test_check_is_three_times_as_fast_as_the_tutorials_map(smollm2: Path) -> None:
    """Check a million rows and the prompt prefix of each, the start of the command included."""
    results = check.measure(smollm2, DATA, 1_000_000, 30_000, distinct=False)
    print(json.dumps(results))
    assert results["rows"]["kept"] == results["rows"]["read"] == 1_000_000
    assert results["ratio"] >= 3
    assert results["peak_rss_bytes"] < 1e9


@pytest.mark.slow
@pytest.mark.smollm2
def test_speed_and_memory_do_not_depend_on_the_files_size(smollm2: Path) -> None:
    results = linear.measure(smollm2, DATA, [1_000, 100_000], ["train.max_steps=60"])
    print(json.dumps(results))
    assert results["tokens_per_s"] == pytest.approx(1, abs=0.1)
    assert results["peak_rss"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.smollm2
def test_training_is_many_times_as_fast_as_the_tutorials_recipe(smollm2: Path, tmp_path: Path) -> None:
    """Check the numbers in the README on a processor with AMX; on others only measure."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "bench.py",
        "--model",
        smollm2,
        "--data",
        DATA,
        "--json",
        tmp_path / "b.json",
    ]
    done = subprocess.run([*map(str, command), "--rows", "80", "--repeats", "1"], check=False)
    assert done.returncode == 0
    results = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    print(json.dumps(results["ratios"]), results["limit"])
    if "amx_bf16" not in results["machine"]["instructions"]:
        pytest.skip("this processor has no AMX")
    dropped, plain = results["ratios"]["dropout 0.1"], results["ratios"]["dropout 0.0"]
    assert dropped["speed against the recipe as given"] >= 12
    assert plain["speed against the recipe as given"] >= 5
    assert plain["speed against its fastest setting"] >= 4.5
    assert plain["memory against its fastest setting"] <= 0.5


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("rows", [1, 4])
def test_sixty_steps_take_no_longer_than_without_optimisations(rows: int, smollm2: Path, tmp_path: Path) -> None:
    """Time the whole command with empty caches: nothing is compiled, encoded or calibrated yet."""
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
def test_the_first_step_starts_soon(smollm2: Path) -> None:
    results = startup.measure(smollm2, DATA, 3, [], quantised=False)
    print(json.dumps(results))
    assert results["warm_until_first_step"] - results["bare"] <= 1.5
    assert results["chat"] - results["bare"] <= 1.5
    assert results["cold_until_first_step"] <= 10


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_command_measures_and_writes(smollm2: Path, tmp_path: Path) -> None:
    options = ["--model", smollm2, "--rows", 16, "--repeats", 1, "--dropout", 0, "--json", tmp_path / "b.json"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    print(done.stdout)
    assert results["ratios"]["dropout 0.0"]["speed against its fastest setting"] > 1
