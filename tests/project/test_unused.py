"""Every function in the source is used in the source, or listed here with a reason."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import luthier
from tests.helpers.layout import modules

# public functions of the library, and names that another library calls
PUBLIC = {*luthier.__all__}
CALLED_FROM_OUTSIDE = {
    "main",  # the entry point
    "put", "end",  # transformers' streamers
    "update", "get_seq_length",  # transformers' Cache
    "extra_repr", "forward", "backward",  # torch
    "tokenize",  # rouge-score
}  # fmt: skip
# used by tests or benchmarks only, with the reason why it is in the source
KEPT = {
    "bytes_held": "what the compiled layers hold, which the estimate is compared with",
}


OTHERS = ("self.model", "model", "os", "json", "yaml", "torch", "subprocess")  # objects whose methods are not luthier's


def functions(trees: dict[str, ast.Module]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function and method except special methods, routes, validators and methods of protocols."""
    for name, tree in trees.items():
        protocols = [
            n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "Protocol" in map(ast.unparse, n.bases)
        ]
        declared = {id(method) for protocol in protocols for method in protocol.body}
        for node in ast.walk(tree):
            if id(node) in declared:
                continue
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
                continue
            decorators = [ast.unparse(d) for d in node.decorator_list]
            if any(d.startswith(("app.", "field_validator", "model_validator")) for d in decorators):
                continue
            yield f"{name}.{node.name}", node  # type: ignore[misc]


def uses(trees: dict[str, ast.Module]) -> Counter[str]:
    """Count how often each name is read, as a name, an attribute, or an import."""
    counts: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                counts[node.id] += 1
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OTHERS:
                counts[node.attr] += 1
    return counts


def unused(trees: dict[str, ast.Module]) -> list[str]:
    used = uses(trees)
    return sorted(
        full
        for full, node in functions(trees)
        if not used[node.name] and node.name not in PUBLIC | CALLED_FROM_OUTSIDE | set(KEPT)
    )


def test_no_function_is_used_by_tests_only() -> None:
    assert unused(modules()) == []


def test_listed_functions_exist_and_are_still_unused() -> None:
    trees = modules()
    names = {node.name for _, node in functions(trees)}
    assert set(KEPT) <= names
    assert not [name for name in KEPT if uses(trees)[name] > 1]  # bytes_held calls the arena's


def test_an_unused_function_is_detected() -> None:
    trees = {"luthier.x": ast.parse("def lonely():\n    pass\n\ndef used():\n    pass\n\nused()")}
    assert unused(trees) == ["luthier.x.lonely"]
