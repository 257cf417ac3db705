"""Every function and class in the source is used in the source, or listed here with a reason.

Functions and classes of a module are resolved through imports; methods are matched by name.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import luthier
from tests.helpers.layout import modules

# public functions of the library by full name, and methods that another library calls
PUBLIC = {f"{module}.{name}" for name, module in luthier._EXPORTS.items()}
CALLED_FROM_OUTSIDE = {
    "put", "end",  # transformers' streamers
    "update", "get_seq_length",  # transformers' Cache
    "extra_repr", "forward", "backward",  # torch
    "tokenize",  # rouge-score
    "tofile",  # gguf
}  # fmt: skip
# used by tests or benchmarks only, with the reason why it is in the source
KEPT = {
    "bytes_held": "what the compiled layers hold, which the estimate is compared with",
    "process_id": "of llama.cpp, whose memory a benchmark reads and which a test ends",
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


def top_level(trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the full name of every function and class that is not inside another."""
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                if not node.name.startswith("__") and not any(d.startswith("app.") for d in decorators):
                    yield f"{module}.{node.name}"


def imported(trees: dict[str, ast.Module]) -> dict[str, dict[str, str]]:
    """Return what each name that a module imports from luthier stands for: a module, function or class."""
    bound: dict[str, dict[str, str]] = {module: {} for module in trees}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                bound[module] |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                bound[module] |= {a.asname or a.name: a.name for a in node.names}
    return bound


class _Reads(ast.NodeVisitor):
    """Collect the names that a module reads, without names that the function around them assigns."""

    def __init__(self) -> None:
        self.nodes: list[ast.expr] = []
        self._local: list[set[str]] = [set()]

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        self._local.append(self._local[-1] | stored | arguments)
        self.generic_visit(node)
        self._local.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id not in self._local[-1]:
            self.nodes.append(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.nodes.append(node)
        self.generic_visit(node)


def used_names(trees: dict[str, ast.Module]) -> set[str]:
    """Return the full names of the functions and classes that are read somewhere; an import alone is no use."""
    bound = imported(trees)

    def resolve(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        target = bound.get(module, {}).get(leaf, name)
        return name if target == name else resolve(target)  # a package passes on what its modules define

    used = set()
    for module, tree in trees.items():
        reads, names = _Reads(), bound[module]
        reads.visit(tree)
        for node in reads.nodes:
            if isinstance(node, ast.Name):
                used.add(resolve(names.get(node.id, f"{module}.{node.id}")))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                used.add(resolve(f"{names[node.value.id]}.{node.attr}"))
    return used


def unused(trees: dict[str, ast.Module]) -> list[str]:
    """List the functions, methods and classes that nothing in the source uses."""
    used, full_names, by_name = used_names(trees), set(top_level(trees)), uses(trees)
    methods = {full: node.name for full, node in functions(trees) if full not in full_names}
    idle = {full for full, name in methods.items() if not by_name[name] and name not in CALLED_FROM_OUTSIDE | set(KEPT)}
    return sorted(idle | (full_names - used - PUBLIC))


def test_no_function_is_used_by_tests_only() -> None:
    assert unused(modules()) == []


def test_listed_functions_exist_and_are_still_unused() -> None:
    trees = modules()
    names = {node.name for _, node in functions(trees)}
    assert set(KEPT) <= names
    assert not [name for name in KEPT if uses(trees)[name] > 1]  # bytes_held calls the arena's


def test_unused_functions_and_classes_are_detected() -> None:
    x = """
def lonely(): ...
def used(): ...
class Old:
    def idle(self): ...
def other(lonely):
    lonely()
used(), other(1)
"""
    y = "from luthier.x import lonely\n\ntensor.lonely()\n"  # a method of the same name; imported, but not called
    trees = {"luthier.x": ast.parse(x), "luthier.y": ast.parse(y)}
    assert unused(trees) == ["luthier.x.Old", "luthier.x.idle", "luthier.x.lonely"]
    z = ast.parse("from luthier import x as names\n\nnames.lonely()\nnames.Old().idle()")
    assert unused({**trees, "luthier.z": z}) == []
