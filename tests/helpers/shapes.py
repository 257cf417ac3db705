"""Check the tensor shapes in luthier's annotations on every call, while the tests run.

``install`` changes how luthier's modules are imported: every function, method and dataclass of a module's top level
whose annotations mention a shape is wrapped. The wrapper checks the parameters and the result that have a shape, with
beartype, and nothing else, since tests pass stand-ins for other arguments. Within one call, the name of a dimension has
one size; a generator's values are checked each by itself.

Annotations are strings, and luthier imports jaxtyping's names under ``if TYPE_CHECKING:`` only. They are evaluated at a
function's first call, with the names of its module and those of these blocks.

Not checked: nested functions, protocols, functions passed as arguments, and programs that a test starts. Of a list, a
sequence or a mapping, beartype checks one element per call. LUTHIER_TEST_SHAPES=0 turns all checks off.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "luthier"
wrapped: list[tuple[str, str]] = []  # module and name of everything that was wrapped
_DECORATOR = "__check_shapes__"
_typing_only: dict[str, list[ast.stmt]] = {}  # the statements under ``if TYPE_CHECKING:`` of each module


class ShapeError(Exception):
    """A tensor does not have the annotated shape. Not a TypeError, so that no code under test handles it."""


_CONFIG = BeartypeConf(violation_type=ShapeError, is_color=False)


def install() -> None:
    """Check the shapes of all modules of luthier that are imported from now on."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec), None)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compile a module with shapes with decorators added; such code is never cached on disk."""

    def get_code(self, fullname: str) -> CodeType | None:
        source = self.get_data(self.path)
        if b"jaxtyping" not in source:
            return super().get_code(fullname)
        tree = ast.parse(source)
        _typing_only[fullname] = [s for block in typing_blocks(tree) for s in block.body]
        for node in shaped(tree.body, names(tree)):
            decorator = ast.copy_location(ast.Name(_DECORATOR, ast.Load()), node)
            if isinstance(node, ast.ClassDef):
                node.decorator_list.insert(0, decorator)
            else:
                node.decorator_list.append(decorator)
        code: CodeType = compile(tree, self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_DECORATOR] = checked
        super().exec_module(module)


def typing_blocks(tree: ast.Module) -> list[ast.If]:
    """List the ``if TYPE_CHECKING:`` blocks of a module."""
    return [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]


def names(tree: ast.Module) -> set[str]:
    """List the names of a module that may stand for shapes: those imported from jaxtyping, and aliases of types."""
    imported: dict[str, set[str]] = {"jaxtyping": set(), PACKAGE: set(), "": set()}
    for node in (s for block in typing_blocks(tree) for s in block.body):
        if isinstance(node, ast.ImportFrom):
            package = str(node.module).partition(".")[0]
            imported.get(package, set()).update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            imported[""] |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set[str]().union(*imported.values()) if imported["jaxtyping"] else set()


def shaped(body: Sequence[ast.stmt], names: set[str]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the functions, methods and dataclasses whose annotations mention one of ``names``."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]
            if _mention([*(a.annotation for a in arguments), node.returns], names):
                yield node
        elif isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
            yield from shaped(node.body, names)
            fields = [s.annotation for s in node.body if isinstance(s, ast.AnnAssign)]
            if any("dataclass" in ast.unparse(d) for d in node.decorator_list) and _mention(fields, names):
                yield node


def _mention(annotations: Sequence[ast.expr | None], names: set[str]) -> bool:
    nodes = (node for annotation in annotations if annotation for node in ast.walk(annotation))
    return any(isinstance(node, ast.Name) and node.id in names for node in nodes)


def checked(target: Any) -> Any:
    """Wrap a function, or the constructor of a dataclass, so that every call checks its shapes."""
    wrapped.append((target.__module__, target.__name__))
    if isinstance(target, type):
        target.__init__ = _checked_function(target.__init__, target.__module__)  # type: ignore[misc]
        return target
    return _checked_function(target, target.__module__)


def _checked_function(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    check_parameters: Callable[..., None] | None = None
    check_result: Callable[[Any], Any] | None = None
    is_generator = inspect.isgeneratorfunction(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal check_parameters, check_result
        if check_parameters is None:
            check_parameters, check_result = _checks(function, module, is_generator)
        with jaxtyped("context"):
            check_parameters(*args, **kwargs)
            result = function(*args, **kwargs)
            if check_result is None:
                return result
            if is_generator:
                return _Checked(result, check_result)
            check_result(result)
            return result

    return wrapper


class _Checked:
    """A generator whose values are checked, each by itself; keeps no reference to them."""

    def __init__(self, generator: Any, check: Callable[[Any], Any]) -> None:
        self._generator, self._check = generator, check

    def __iter__(self) -> _Checked:
        return self

    def __next__(self) -> Any:
        value = next(self._generator)
        with jaxtyped("context"):
            self._check(value)
        return value

    def throw(self, *error: Any) -> Any:
        return self._generator.throw(*error)

    def close(self) -> None:
        self._generator.close()


def _checks(
    function: Callable[..., Any], module: str, is_generator: bool
) -> tuple[Callable[..., None], Callable[[Any], Any] | None]:
    """Build a function that checks the parameters, and one that checks the result; None if it has no shape."""
    texts = {name: text for name, text in function.__annotations__.items() if isinstance(text, str)}
    hints = {name: eval(text, _namespace(module)) for name, text in texts.items()}
    hints = {name: hint for name, hint in hints.items() if _has_shape(hint)}
    result = hints.pop("return", None)
    if is_generator and result is not None:
        (result, *_) = get_args(result)
    parameters = _stub(function, str(_without_annotations(inspect.signature(function))), hints)
    returned = None if result is None else _stub(function, "(result)", {"result": result})
    return parameters, returned


def _without_annotations(signature: inspect.Signature) -> inspect.Signature:
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else None)
        for p in signature.parameters.values()
    ]
    return inspect.Signature(parameters)


def _stub(function: Callable[..., Any], signature: str, hints: dict[str, Any]) -> Callable[..., Any]:
    """Build a function that does nothing but let beartype check its arguments."""
    scope: dict[str, Any] = {}
    exec(f"def {function.__name__}{signature}: pass", scope)
    stub = scope[function.__name__]
    stub.__annotations__ = hints
    stub.__module__, stub.__qualname__ = function.__module__, function.__qualname__
    return beartype(conf=_CONFIG)(stub)


@functools.cache
def _namespace(module: str) -> dict[str, Any]:
    """Return the names of a module, with those that it imports for type checkers only."""
    scope = dict(vars(sys.modules[module]))
    for node in _typing_only.get(module, []):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            importlib.import_module(node.module)
            others = _namespace(node.module)  # an alias may exist for type checkers only there too
            scope |= {alias.asname or alias.name: others[alias.name] for alias in node.names}
        else:
            exec(compile(ast.Module([node], []), module, "exec"), scope)
    return scope


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, get_args(hint)))
