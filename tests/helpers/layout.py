"""Define the order in which packages of ``src/luthier`` may import each other, and write the map in CONTRIBUTING.md.

python -m tests.helpers.layout     writes the map from this order and the packages' docstrings
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "luthier"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the map: written by tests/helpers/layout.py -->\n", "<!-- end of the map -->\n"

# a module may import from its own package and those before it
ORDER = (
    "errors", "types", "_util", "config",
    "data", "templates", "encoding", "batching", "devices", "kernels", "models", "lora", "compiled", "adapters",
    "training", "inference", "evaluation", "exporting", "serving", "hub", "recipes", "personas", "verbs", "cli",
    "__main__",
)  # fmt: skip


def typing_only(tree: ast.Module) -> set[int]:
    """Return the ``id`` of every node inside an ``if TYPE_CHECKING:`` block: what a type checker sees and no run."""
    return {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }


def modules() -> dict[str, ast.Module]:
    """Parse every module of luthier; the result is by dotted name."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def top(module: str) -> str:
    """``luthier.data.source`` -> ``data``."""
    return [*module.split("."), ""][1]


def table() -> str:
    """Build the map: every package and its purpose, in the order of imports."""
    lines = [BEGIN, "| package | what it is for | modules |\n", "|---|---|---|\n"]
    for name in ORDER:
        package = SOURCE / name
        file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = doc.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        inside = sorted(
            p.stem + ("/" if p.is_dir() else "")
            for p in (package.iterdir() if package.is_dir() else ())
            if not p.name.startswith("__") and (p.is_dir() or p.suffix == ".py")
        )
        label = f"`{name}/`" if package.is_dir() else f"`{name}.py`"
        lines.append(f"| {label} | {first} | {', '.join(inside)} |\n")
    return "".join([*lines, END])


def written(page: str) -> str:
    """Return the page with an up-to-date map."""
    before, rest = page.split(BEGIN)
    return before + table() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
