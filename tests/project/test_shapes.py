"""Public tensor functions carry shapes, which the tests check (``tests/helpers/shapes.py``); nobody else pays for them.

Deliberate faults: functions without shapes, calls with wrong shapes.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier import types
from luthier.adapters.original_names import Update
from luthier.batching.collate import collate, to_device
from luthier.config import LoraConfig
from luthier.exporting import merge
from luthier.exporting.verify import closeness
from luthier.serving.head import SlicedHead
from luthier.types import Example, RowRef
from tests.helpers.layout import modules

_ELEMENTS = ("Bool", "Float", "Int", "Shaped")  # jaxtyping's names that luthier uses
_WITHOUT = re.compile(r"(torch\.)?Tensor")
_FIRST_COLUMN = re.compile(r"^ {4}(\S.*?) {2,}\S", re.MULTILINE)
_HOOKED = os.environ.get("LUTHIER_TEST_SHAPES") != "0"
hooked = pytest.mark.skipif(not _HOOKED, reason="LUTHIER_TEST_SHAPES=0")


def with_shape(annotation: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield each ``Float[Tensor, "tokens hidden"]`` in an annotation, with its dimensions."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in _ELEMENTS:
            assert isinstance(node.slice, ast.Tuple)
            yield node, ast.literal_eval(node.slice.elts[1])


def plain_tensor(annotation: ast.AST) -> bool:
    """Whether an annotation mentions a tensor without a shape."""
    inside = {id(part) for node, _ in with_shape(annotation) for part in ast.walk(node)}
    return any(_WITHOUT.fullmatch(ast.unparse(n)) for n in ast.walk(annotation) if id(n) not in inside)


def public(name: str, tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, list[ast.expr]]]:
    """Yield the annotations of public functions, methods and fields."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(f"{name}.{node.name}", node)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.endswith("__")):
            arguments = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation]
            yield f"{name}.{node.name}", [*arguments, *([node.returns] if node.returns else [])]
        elif isinstance(tree, ast.ClassDef) and isinstance(node, ast.AnnAssign):
            field = ast.unparse(node.target)
            if not field.startswith("_"):
                yield f"{name}.{field}", [node.annotation]


def without_shapes(trees: dict[str, ast.Module]) -> set[str]:
    return {
        full
        for name, tree in trees.items()
        for full, annotations in public(name, tree)
        if any(map(plain_tensor, annotations))
    }


def dimensions(trees: dict[str, ast.Module]) -> set[str]:
    """List the names of dimensions in annotations; those of any size count as the name after the underscore."""
    texts = {text for tree in trees.values() for _, text in with_shape(tree)}
    return {part.strip("*_") for text in texts for part in text.split()} - {"..."}


def explained() -> set[str]:
    """List the names in the first column of the table in ``luthier/types.py``, and those introduced beside them."""
    table = str(types.__doc__)
    first = {name for column in _FIRST_COLUMN.findall(table) for name in re.findall(r"\w+", column)}
    return first | set(re.findall(r"; (\w+): ", table))


def test_public_functions_and_fields_with_tensors_have_shapes() -> None:
    assert without_shapes(modules()) == set(), "write Float[Tensor, ...] with dimensions listed in luthier/types.py"


def test_every_dimension_is_explained() -> None:
    assert {name for name in dimensions(modules()) if not name.isdigit()} == explained() - {"_name"}


def test_the_tests_detect_functions_without_shapes_and_unknown_dimensions() -> None:
    code = """
def f(x: Tensor) -> None: ...
def g(x: Float[Tensor, "a b"], *y: int) -> dict[str, torch.Tensor | None]: ...
def h(x: Float[Tensor, "a *b"]) -> tuple[Float[torch.Tensor, " _c"], Callable[[Float[Tensor, " ..."]], None]]: ...
def _private(x: Tensor) -> None: ...
class A:
    a: Tensor
    _a: Tensor
    def f(self, *x: Tensor) -> None: ...
    def _g(self, x: Tensor) -> None: ...
class _B:
    def f(self, x: Tensor) -> None: ...
"""
    trees = {"m": ast.parse(code)}
    assert without_shapes(trees) == {"m.f", "m.g", "m.A.a", "m.A.f"}
    assert dimensions(trees) == {"a", "b", "c"}


@hooked
def test_everything_with_a_shape_is_wrapped() -> None:
    from tests.helpers import shapes

    for name, tree in modules().items():
        importlib.import_module(name)
        expected = sorted(node.name for node in shapes.shaped(tree.body, shapes.names(tree)))
        assert sorted(function for module, function in shapes.wrapped if module == name) == expected
    assert len(shapes.wrapped) > 100


@hooked
def test_parameters_are_checked_with_one_size_per_name() -> None:
    from tests.helpers.shapes import ShapeError

    base, tuned, rounded = torch.randn(3, 3, 5)
    assert closeness(base, tuned, rounded, tuned, 1).tokens == 3
    assert closeness(base, tuned, rounded, tuned, "one").prompts == "one"  # type: ignore[arg-type]
    for wrong in (torch.randn(2, 5), torch.randn(3, 4), torch.randn(5), torch.zeros(3, 5, dtype=torch.long)):
        with pytest.raises(ShapeError, match="closeness.* parameter other"):
            closeness(base, tuned, rounded, wrong, 1)


@hooked
def test_results_are_checked_with_the_sizes_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.shapes import ShapeError

    x, linear = torch.randn(1, 4), nn.Linear(4, 6)
    assert SlicedHead(linear)(x).shape == (1, 6)
    with pytest.raises(ShapeError, match=r"forward.* parameter result"):
        SlicedHead(nn.Sequential(linear, nn.Flatten(0)))(x)  # type: ignore[arg-type]
    update = Update(torch.randn(2, 4), torch.randn(6, 2), LoraConfig(r=2))
    assert merge.delta(update).shape == (6, 4)
    monkeypatch.setattr(merge, "scaling", lambda _: torch.ones(1, 1, 1))
    with pytest.raises(ShapeError, match=r"delta.* parameter result"):
        merge.delta(update)


@hooked
def test_fields_of_dataclasses_are_checked() -> None:
    from tests.helpers.shapes import ShapeError

    batch = collate([Example(np.arange(n), np.arange(n) > 0, RowRef("", n)) for n in (4, 6)])
    segments = to_device(batch, "cpu").segments
    with pytest.raises(ShapeError, match="target_ids"):
        replace(batch, target_ids=batch.target_ids[1:])
    with pytest.raises(ShapeError, match="key_index"):
        replace(segments, key_index=segments.key_index[None])
    with pytest.raises(ShapeError, match="parameter b="):
        Update(torch.randn(2, 4), torch.randn(6), LoraConfig(r=2))


@hooked
def test_the_values_of_generators_are_checked() -> None:
    from tests.helpers.shapes import ShapeError, checked

    @contextmanager
    @checked
    def lent(x: Float[Tensor, "rows columns"], again: bool = False) -> Iterator[Float[Tensor, " rows"]]:
        yield x.flatten() if again else x

    with lent(torch.zeros(2, 3), True) as value:
        assert value.shape == (6,)
    with pytest.raises(ShapeError), lent(torch.zeros(2, 3)):
        pass
    with pytest.raises(KeyError), lent(torch.zeros(2, 3), True):
        raise KeyError  # reaches the generator


def _run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


_LOADED = "print([m for m in ('jaxtyping', 'beartype') if m in sys.modules])"


def test_users_import_neither_package() -> None:
    assert _run(f"import sys, luthier; {_LOADED}") == ["[]"]
    code = f"""
import sys
from luthier.cli.main import main
sys.argv = ["luthier", "--help"]
try:
    main()
except SystemExit:
    {_LOADED}
"""
    out = _run(code)
    assert "Usage" in "".join(out) and out[-1] == "[]"


def test_luthier_works_without_either_package() -> None:
    names = sorted(modules())
    code = f"""
import importlib, sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None  # an import fails
for name in {names!r}:
    importlib.import_module(name)
from luthier.kernels.dropout import keep
print(*keep(1, 2, 3, 0.5).shape)
"""
    assert _run(code) == ["2 3"]
