"""The notebooks are what make.py writes, have the same code in both languages, and every cell of all ten works."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

import luthier
from luthier import hub, personas, recipes
from luthier.inference.sampling import Sampling
from tests.conftest import ROOT
from tests.helpers.published import PUBLISHED
from tests.recipes.test_recipes import TUTORIALS

FOLDER = ROOT / "notebooks"
NAMES = sorted(p.name for p in FOLDER.glob("*.ipynb"))
CHECKPOINTS = {
    "yi-6b-chat": "yi",
    "phi-3-mini-4k-instruct": "phi3",
    "baichuan2-7b-chat": "baichuan2",
    "glm-4-9b-chat": "glm4",
    "deepseek-7b-chat-qlora": "deepseek",
}
STEPS = ["prepare", "download", "data", "encode", "load", "lora", "train", "save", "reload", "talk"]
SHORT = {"train.max_steps": 3, "train.logging_steps": 1, "generation.max_new_tokens": 8}


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def recipe_of(name: str) -> str:
    return name.partition(".")[0]


def code(notebook: NotebookNode) -> dict[str, str]:
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a tiny checkpoint in the published layout of a recipe's family."""
    root = tmp_path_factory.mktemp("published")
    paths: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in paths:
            paths[recipe] = PUBLISHED[CHECKPOINTS[recipe]](root / recipe)
        return paths[recipe]

    return get


@pytest.fixture
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use a separate working directory and cache, and do not show plots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with mpl.rc_context({"backend": "agg"}):
        plt.switch_backend("agg")
        yield tmp_path
        plt.close("all")


def injected(values: dict[str, Any]) -> str:
    """Make a cell of parameters that replaces the first one."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return "\n".join(f"{name} = {plain(v)!r}" for name, v in values.items())


def play(notebook: NotebookNode, values: dict[str, Any]) -> dict[str, Any]:
    """Run every code cell in one namespace and return it."""
    names: dict[str, Any] = {}
    for name, source in code(notebook).items():
        exec(compile(source, f"<{name}>", "exec"), names)
        if name == "parameters":
            exec(injected(values), names)
    return names


def test_each_tutorial_has_two_notebooks_that_are_up_to_date(make: ModuleType) -> None:
    written = make.written()
    assert sorted(written) == NAMES
    assert sorted({recipe_of(n) for n in NAMES}) == recipes.names() == sorted(CHECKPOINTS)
    assert len(NAMES) == 10
    for name, content in written.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content, f"run: python notebooks/make.py ({name})"
        nbformat.validate(read(name))
        assert not re.search(r"<[A-Z]+>", content), name
        for cell in read(name).cells:
            assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("recipe", CHECKPOINTS)
def test_both_languages_have_the_same_steps_and_code(recipe: str) -> None:
    english, chinese = read(f"{recipe}.ipynb"), read(f"{recipe}.zh-CN.ipynb")
    assert [c.id for c in english.cells] == [c.id for c in chinese.cells]
    assert code(english) == code(chinese)
    assert list(code(english)) == ["parameters", *STEPS]
    for a, b in zip(english.cells, chinese.cells, strict=True):
        if a.cell_type == "markdown":
            numbers = [re.findall(r"\d[\d,.]*\d|`[^`]+`", c.source) for c in (a, b)]
            assert sorted(numbers[0]) == sorted(numbers[1]), a.id  # numbers and names are in both
            assert not re.search("[\u4e00-\u9fff]", re.sub("微调", "", a.source)), a.id
            assert re.search("[\u4e00-\u9fff]", b.source), b.id


def test_the_first_cell_has_all_that_a_reader_changes() -> None:
    for name in NAMES:
        first = next(c for c in read(name).cells if c.cell_type == "code")
        assert first.metadata.tags == ["parameters"]
        names: dict[str, Any] = {}
        exec(first.source, names)
        assert names["DATA"] == "huanhuan.json"
        assert names["RUN"] == f"runs/{recipe_of(name)}"
        assert names["MODEL"].parent == hub.default_dir("any").parent
        assert (names["SETTINGS"], names["MERGED"]) == ({}, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_trains_and_chats(
    name: str, checkpoint: Callable[[str], Path], aside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, english = recipe_of(name), "zh-CN" not in name
    model, merged = checkpoint(recipe), aside / "merged" if english else None
    names = play(read(name), {"MODEL": model, "RUN": "run", "MERGED": merged, "SETTINGS": SHORT})
    printed = capsys.readouterr().out
    run = aside / "run"

    losses = json.loads((run / "summary.json").read_text())["losses"]
    assert len(losses) == 3 and losses[-1] != losses[0]
    assert (run / "adapter" / "luthier.json").is_file()
    assert "huanhuan.json does not exist: using the shipped persona teahouse.zh.jsonl" in printed
    assert names["config"].data.train == (personas.TEAHOUSE,) and names["config"].data.system == ""
    assert "在下姓陆" in printed  # the rows
    assert names["summary"]["rows"]["kept"] == 74 == len(names["rows"].train)
    assert names["summary"]["quantised"] == ("nf4" if "qlora" in name else None)
    assert f"{names['summary']['trainable_parameters']:,} parameters train" in printed

    drawn = names["loss_axes"].lines[0]
    assert list(drawn.get_xdata()) == [1, 2, 3]
    assert list(drawn.get_ydata()) == losses
    assert sum(bar.get_height() for bar in names["lengths_axes"].patches) == 74
    assert len(plt.get_fignums()) == 2

    reply, again = names["reply"], luthier.chat(run)
    assert names["talk"].sampling == again.sampling == Sampling.of(names["config"].generation)
    assert 1 <= reply.reply_tokens <= 8
    assert printed.endswith(f"  tuned  {reply.text}\n")
    assert again.send("你是谁？").text == reply.text
    assert (merged is not None and (merged / "model.safetensors").is_file()) == english


def test_the_users_rows_are_trained_with_the_recipes_system_prompt(
    checkpoint: Callable[[str], Path], aside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is not trained again."""
    rows = [{"instruction": "你是谁？", "input": "", "output": "我是甄嬛。"}, {"instruction": "你好", "output": "好。"}]
    (aside / "huanhuan.json").write_text(json.dumps(rows), encoding="utf-8")
    values = {"MODEL": checkpoint("glm-4-9b-chat"), "RUN": "run", "SETTINGS": SHORT}
    names = play(read("glm-4-9b-chat.ipynb"), values)
    assert names["config"].data.train == (Path("huanhuan.json"),)
    assert names["talk"].system == "假设你是皇帝身边的女人--甄嬛。"
    printed = capsys.readouterr().out
    assert "does not exist" not in printed and "我是甄嬛。" in printed
    before = {p: p.stat().st_mtime_ns for p in (aside / "run").rglob("*")}
    play(read("glm-4-9b-chat.zh-CN.ipynb"), values)
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (aside / "run").rglob("*")} == before


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_model_is_pulled_by_its_name(name: str, aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def pull(model: str, to: Path, **_: Any) -> Path:
        asked.append((model, to))
        to.mkdir(parents=True)
        return to

    monkeypatch.setattr(luthier, "pull", pull, raising=False)
    cells = code(read(name))
    names: dict[str, Any] = {"Path": Path, "luthier": luthier}
    for _ in range(2):  # the second time it exists
        exec(f"{cells['parameters']}\n{cells['download']}", names)
    assert asked == [(names["MODEL"].name, names["MODEL"])]
    assert asked[0][0] in hub.REPOSITORIES
    inspect.signature(pull).bind(asked[0][0], to=asked[0][1], log=print)


def test_a_mistake_in_the_data_stops_the_notebook(checkpoint: Callable[[str], Path], aside: Path) -> None:
    (aside / "huanhuan.json").write_text('[{"instrution": "a", "output": "b"}]', encoding="utf-8")
    with pytest.raises(luthier.UserError, match="did you mean 'instruction'"):
        play(read("yi-6b-chat.ipynb"), {"MODEL": checkpoint("yi-6b-chat"), "RUN": "run", "SETTINGS": SHORT})
    assert not (aside / "run").exists()


@pytest.mark.parametrize("recipe", CHECKPOINTS)
def test_the_text_agrees_with_the_recipe_and_the_tutorial(recipe: str, tutorials: Path) -> None:
    """Quotations are in the tutorial, and the numbers of parameters are those of the recipe."""
    page = (tutorials / TUTORIALS[recipe]).read_text(encoding="utf-8")
    text = "\n".join(c.source for c in read(f"{recipe}.ipynb").cells if c.cell_type == "markdown")
    assert re.search(r'tutorial "([^"]+)"', text).group(1) in page.splitlines()[0].strip("# .")  # type: ignore[union-attr]
    faults = {
        "yi-6b-chat": ["q_attn", "instrution", "torch.half", "checkpoint-600", "transformers==4.35.2"],
        "phi-3-mini-4k-instruct": ["tokenizer.eos_toke", "add_generation_prompt=False", "./Phi-3_lora", "flash-attn"],
        "baichuan2-7b-chat": ["W_pack", "instrution", "output/Baichuan3/checkpoint-600", "transformers==4.33.1"],
        "glm-4-9b-chat": ["dense_h_to_4h", "./GLM4_lora", "flash-attn", "transformers>=4.40.0"],
        "deepseek-7b-chat-qlora": ["<｜end of sentence｜>", "load_in_4bit=True", "bitsandbytes==0.41.1"],
    }[recipe]
    for fault in faults:
        assert fault in page, fault
        assert fault in text or fault.replace("==", "` ") in text, fault
    in_recipe = set(re.findall(r"\d\d?,\d{3},\d{3}", recipes.text(recipe)))
    assert in_recipe <= set(re.findall(r"\d\d?,\d{3},\d{3}", text))


def test_a_notebook_runs_in_a_real_kernel_and_shows_its_plots(checkpoint: Callable[[str], Path], aside: Path) -> None:
    """With the inline backend, coloured tokens, and no output of a cell's last expression."""
    notebook = read("phi-3-mini-4k-instruct.zh-CN.ipynb")
    values = {"MODEL": checkpoint("phi-3-mini-4k-instruct"), "RUN": "run", "SETTINGS": SHORT}
    notebook.cells.insert(2, new_code_cell(injected(values), id="injected"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(aside)}}).execute()
    outputs = {c.id: c.outputs for c in notebook.cells if c.cell_type == "code"}
    pictures = {name: [o for o in out if "image/png" in o.get("data", {})] for name, out in outputs.items()}
    assert {name for name, images in pictures.items() if len(images) == 1} == {"encode", "train"}
    assert any("font-weight: bold" in o["data"].get("text/html", "") for o in outputs["encode"] if "data" in o)
    assert not [o for out in outputs.values() for o in out if o.output_type in ("execute_result", "error")]
    assert "你是谁？\n  base   " in outputs["talk"][-1]["text"]
