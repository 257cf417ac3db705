"""``Any`` is rare and in no public signature, and few lines are exempt from mypy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "luthier"
ANY_AT_MOST, IGNORED_AT_MOST, CASTS_AT_MOST = 30, 16, 2


def uses_of_any(tree: ast.AST) -> int:
    """Count the uses of the name ``Any``, imports excluded."""
    return sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(tree))


def public_signatures(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Yield functions and methods that neither have a private name nor belong to a private class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_signatures(node)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield node


def faults(tree: ast.Module) -> list[str]:
    """List public functions with ``Any`` in an annotation, as name:line."""
    locations = []
    for function in public_signatures(tree):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        annotations = [a.annotation for a in every if a and a.annotation]
        annotations += [function.returns] if function.returns else []
        if any(uses_of_any(annotation) for annotation in annotations):
            locations.append(f"{function.name}:{function.lineno}")
    return locations


def test_any_is_rare() -> None:
    counts = {p: uses_of_any(ast.parse(p.read_text(encoding="utf-8"))) for p in SOURCE.rglob("*.py")}
    assert sum(counts.values()) <= ANY_AT_MOST, {str(p.relative_to(SOURCE)): n for p, n in counts.items() if n}


def test_no_public_signature_has_any() -> None:
    faulty = {
        str(p.relative_to(SOURCE)): faults(ast.parse(p.read_text(encoding="utf-8"))) for p in SOURCE.rglob("*.py")
    }
    assert {name: lines for name, lines in faulty.items() if lines} == {}


def test_few_lines_are_exempt_from_the_type_checker() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py"))
    assert len(re.findall(r"# type: ignore", text)) <= IGNORED_AT_MOST
    assert len(re.findall(r"\bcast\(", text)) <= CASTS_AT_MOST


def test_the_tests_detect_faults() -> None:
    tree = ast.parse("from typing import Any\ndef f(x: list[Any]) -> None: ...\nclass A:\n def g(self) -> Any: ...")
    assert faults(tree) == ["f:2", "g:4"]
    assert faults(ast.parse("def _f(x: Any): ...\nclass _A:\n def g(self) -> Any: ...")) == []
    assert uses_of_any(tree) == 2
