"""The structure: imports follow the order of packages, no cycles, light imports, no long file or function.

The same checks are run on invented modules that break each rule.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.cli.main import app
from tests.helpers.layout import ORDER, PAGE, ROOT, SOURCE, modules, top, typing_only, written

LINES_A_FILE, LINES_A_FUNCTION = 400, 80
PLACE = {name: i for i, name in enumerate(ORDER)}
TOP_LEVEL = {"__init__.py", "__main__.py", "errors.py", "types.py", "config.py", "py.typed"}
CALLED_BEFORE, CALLED_AT_MOST = 64, 48  # modules used by one run before packages existed, and the limit now
# not counted: files of their own since rows have tools, thoughts and flags, because of the limit on lines; the model's
# own template, whose stop token and date are looked at even if a native one is used
ROWS = {"data/keys.py", "encoding/control.py", "models/tokenizer/chat_template.py", "templates/own.py"}
# not counted: luthier's own decoding of a run's replies, which transformers did before
DECODING = {"compiled/decoder.py", "compiled/pages.py", "inference/decoding.py", "inference/sampling.py"}


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield (imported module of luthier, whether at the top of the file). Imports under TYPE_CHECKING do not count."""
    unseen = typing_only(tree)
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        at_top = node in tree.body
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert [a.name for a in node.names] != ["*"], "no star imports"
            if node.module == "luthier":
                yield from ((f"luthier.{a.name}" if a.name in PLACE else "luthier", at_top) for a in node.names)
            elif (node.module or "").startswith("luthier."):
                yield str(node.module), at_top
        elif isinstance(node, ast.Import):
            yield from ((a.name, at_top) for a in node.names if a.name.split(".")[0] == "luthier")


def order_faults(trees: dict[str, ast.Module]) -> list[str]:
    faults = []
    for name, tree in trees.items():
        if name == "luthier":
            continue
        assert top(name) in PLACE, f"{name} is in no package"
        for target, _ in imports(tree):
            if target != "luthier" and PLACE[top(target)] > PLACE[top(name)]:
                faults.append(f"{name} imports {target}, which comes after it")
    return faults


def inner_faults(trees: dict[str, ast.Module]) -> list[str]:
    """List imports of luthier's modules inside functions, except those of commands."""
    return [
        f"{name} imports {target} inside a function"
        for name, tree in trees.items()
        if top(name) != "cli" and name != "luthier"
        for target, at_top in imports(tree)
        if not at_top
    ]


def cycles(trees: dict[str, ast.Module]) -> list[str]:
    graph = {n: {t if t in trees else t.rpartition(".")[0] for t, _ in imports(tree)} for n, tree in trees.items()}
    loops, done = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            loops.append(" -> ".join([*path[path.index(node) :], node]))
            return
        if node in done:
            return
        for target in sorted(graph.get(node, set()) - {"luthier", node}):
            visit(target, [*path, node])
        done.add(node)

    for name in graph:
        visit(name, [])
    return loops


def long_functions(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name}.{node.name}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LINES_A_FUNCTION
    ]


def test_the_top_level_has_packages_and_few_modules() -> None:
    files = {p.name for p in SOURCE.iterdir() if p.is_file()}
    assert files == TOP_LEVEL
    packages = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert packages | {"errors", "types", "config", "__main__"} == set(ORDER)
    verbs = {verb.name for verb in app.registered_commands}
    assert {p.stem for p in (SOURCE / "verbs").glob("*.py")} == {"__init__", *verbs}
    assert not verbs & packages


def test_imports_follow_the_order_of_the_packages() -> None:
    assert order_faults(modules()) == []


def test_the_map_in_contributing_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "python -m tests.helpers.layout writes it"


def test_a_run_uses_few_modules(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Counted in a separate process with an empty cache; at most 3/4 of the number before packages existed."""
    command = [sys.executable, "-m", "tests.helpers.called_modules", str(model_dir("llama")), str(tmp_path / "run")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout.splitlines()[-1])) - DECODING - ROWS
    assert CALLED_AT_MOST <= 0.75 * CALLED_BEFORE
    assert len(names) <= CALLED_AT_MOST, names
    assert {"verbs/train.py", "encoding/encoder.py", "training/loop.py"} <= names


def test_no_import_cycles() -> None:
    assert cycles(modules()) == []


def test_imports_are_at_the_top() -> None:
    assert inner_faults(modules()) == []


def test_no_file_over_400_lines_and_no_function_over_80() -> None:
    programs = [p for folder in ("benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    files = [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *programs]
    long = [str(p.relative_to(ROOT)) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > LINES_A_FILE]
    assert long == []
    assert long_functions(modules()) == []
    assert long_functions({p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in programs}) == []


def test_the_structure_tests_detect_faults() -> None:
    low = ast.parse("from luthier.verbs.train import train")
    assert order_faults({"luthier.errors": low})
    inner = ast.parse("def f():\n    from luthier import config")
    assert inner_faults({"luthier.verbs.train": inner})
    a, b = ast.parse("from luthier.data import b"), ast.parse("import luthier.data.a")
    assert cycles({"luthier.data.a": ast.parse("import luthier.data.b"), "luthier.data.b": b, "luthier.data": a})
    assert long_functions({"luthier.x": ast.parse("def f():\n" + "    pass\n" * 80)})


@pytest.mark.parametrize("forbidden", ["trust_remote_code=True", "weights_only=False", "allow_pickle=True"])
def test_nothing_unsafe_is_enabled(forbidden: str) -> None:
    """Neither as an argument or its default, nor as a key of options."""
    assert unsafe(forbidden, f"load(path, {forbidden.replace('=', ' = ')})")
    name, value = forbidden.split("=")
    assert unsafe(forbidden, f'options = {{"{name}": {value}}}') and unsafe(forbidden, f"{{'{name}' : {value}}}")
    assert unsafe(forbidden, f'options["{name}"] = {value}') and unsafe(forbidden, f"def f({name}: bool = {value})")
    for path in SOURCE.rglob("*.py"):
        assert not unsafe(forbidden, path.read_text(encoding="utf-8")), path


def unsafe(forbidden: str, source: str) -> bool:
    """Whether a source text sets an option to a value: ``name=value``, ``"name": value`` and similar forms."""
    name, value = forbidden.split("=")
    return re.search(rf"""\b{name}["']?\]?\s*(:\s*bool\s*=|[=:])\s*{value}\b""", source) is not None


@pytest.mark.parametrize(
    "layer", ["luthier", "luthier.types", "luthier.config", "luthier.data.loader", "luthier.cli.main"]
)
def test_light_modules_import_no_torch(layer: str) -> None:
    code = f"import sys, {layer}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_imports() -> None:
    code = f"import importlib; [importlib.import_module(m) for m in {sorted(modules())!r}]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
