"""Write the notebooks in this folder: one per tutorial, in English and in Chinese.

    python notebooks/make.py

Every text is in texts.yaml; the code is the same in both languages. tests/project/test_notebooks.py runs all
notebooks, and checks that the files equal the output of this program.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent
TEXTS: dict[str, Any] = yaml.safe_load((FOLDER / "texts.yaml").read_text(encoding="utf-8"))
SUFFIXES = {"en": "", "zh": ".zh-CN"}
DEFAULTS = {"imports": "", "load": 'model, _ = luthier.load_model(MODEL, dtype="auto")'}


def notebook(recipe: str, language: str) -> NotebookNode:
    """Build one notebook without outputs; its first code cell is tagged ``parameters``."""
    tutorial = TEXTS["tutorials"][recipe]
    words = {**DEFAULTS, **tutorial, "memory": tutorial["memory"][language], "recipe": recipe}
    cells = [
        new_markdown_cell(_filled(TEXTS["intro"][language], words), id="intro"),
        new_code_cell(_filled(TEXTS["parameters"], words), id="parameters", metadata={"tags": ["parameters"]}),
    ]
    for number, (name, step) in enumerate(TEXTS["steps"].items(), 1):
        notes, heading = tutorial["notes"][name], f"## {number}. {step['heading'][language]}"
        text = "\n\n".join([heading, step["does"][language], notes[language], f"> {step['prevents'][language]}"])
        cells.append(new_markdown_cell(_filled(text, words), id=f"{name}-text"))
        cells.append(new_code_cell(_filled(step["code"], words), id=name))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def _filled(text: str, words: Mapping[str, Any]) -> str:
    for name, value in words.items():
        mark = f"<{name.upper()}>"
        text = text.replace(mark if value else f"{mark}\n", str(value))  # an empty value removes its line
    return text


def written() -> dict[str, str]:
    """Return the content of every notebook by file name."""
    return {
        f"{recipe}{suffix}.ipynb": nbformat.writes(notebook(recipe, language)) + "\n"
        for recipe in TEXTS["tutorials"]
        for language, suffix in SUFFIXES.items()
    }


if __name__ == "__main__":
    for name, content in written().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
