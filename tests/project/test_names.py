"""One name, one meaning: no two types share a name, and variables are named after what they hold."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import pytest

from tests.helpers.layout import ROOT, modules

# types that two modules may define under one name, and why
SHARED_NAMES: dict[str, str] = {}
# names that only say that there is a result, or that something is printed, and what to write instead
VAGUE = {
    "found": "what was found: keys, options, faults",
    "given": "what was given: settings, targets",
    "kept": "what was kept: rows, files",
    "say": "log",
}
_ALIAS = re.compile(r"[A-Z]\w*[a-z]\w*")  # not a constant, not a type variable


def types(tree: ast.Module) -> Iterator[str]:
    """Yield the names of a module's public classes and type aliases."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name) and _ALIAS.fullmatch(t.id))


def shared(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """List the modules of every name that several modules use for a type of their own or of another library."""
    users: dict[str, list[str]] = defaultdict(list)
    for module, tree in trees.items():
        for name in types(tree):
            users[name].append(module)
    own = set(users)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "luthier":
                for alias in node.names:
                    if (alias.asname or alias.name) in own:
                        users[alias.asname or alias.name].append(f"{module} (from {node.module})")
    return {name: where for name, where in users.items() if len(where) > 1}


def variables(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and line of every variable, attribute and parameter that is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def vague(trees: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{module}:{line} {name}: name {VAGUE[name]}"
        for module, tree in trees.items()
        for name, line in variables(tree)
        if name in VAGUE
    ]


def test_no_two_types_share_a_name() -> None:
    assert {name: where for name, where in shared(modules()).items() if name not in SHARED_NAMES} == {}
    assert SHARED_NAMES.keys() <= shared(modules()).keys(), "a name that is not shared any more needs no exception"


def test_variables_are_named_after_what_they_hold() -> None:
    folders = ("src", "tests", "benchmarks", "examples", "notebooks")
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert len(files) > 150
    assert vague({str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in files}) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("class Row:\n    pass", "class Row:\n    pass"),
        ("class Row:\n    pass", "Row = tuple[int, str]"),
        ("class Progress:\n    pass", "def f():\n    from rich.progress import Progress"),
    ],
)
def test_a_shared_name_is_detected(first: str, second: str) -> None:
    assert len(shared({"luthier.a": ast.parse(first), "luthier.b": ast.parse(second)})) == 1


def test_private_classes_constants_and_renamed_imports_may_share_a_name() -> None:
    first = ast.parse("class Row:\n    pass\n\nclass _Line:\n    pass\n\nROWS = R = 1")
    second = ast.parse("from luthier.a import Row\nfrom x import Row as TheirRow\nclass _Line:\n    pass\nROWS = R = 2")
    assert shared({"luthier.a": first, "luthier.b": second}) == {}


@pytest.mark.parametrize(
    "code", ["found = 1", "for kept in x:\n    pass", "def f(given):\n    pass", "self.found = 1", "lambda say: say(1)"]
)
def test_a_vague_name_is_detected(code: str) -> None:
    assert len(vague({"x": ast.parse(code)})) == 1
