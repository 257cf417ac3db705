"""List luthier's modules in which one run of ``luthier train`` calls a function.

    python -m tests.helpers.called_modules MODEL_DIR OUTPUT_DIR

Traces a run on the demo's rows, from the parsed options to the exit. Prints one JSON list of module names.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import luthier
from luthier import personas
from luthier.cli import main as cli

SOURCE = str(Path(luthier.__file__).parent)
COMPREHENSIONS = ("<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def called(argv: list[str]) -> list[str]:
    """Run ``luthier train`` and list the modules in which a function was called after typer had parsed ``argv``."""
    files: set[str] = set()
    classes = {name for path in Path(SOURCE).rglob("*.py") for name in _classes(path)}

    def see(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(SOURCE)
        if ours and code.co_name not in (*COMPREHENSIONS, *classes):  # imports run class bodies
            files.add(code.co_filename)

    verb = next(c for c in cli.app.registered_commands if c.name == "train")
    run = verb.callback
    assert run

    @functools.wraps(run)
    def traced(*args: Any, **kwargs: Any) -> None:
        threading.setprofile(see)
        sys.setprofile(see)
        try:
            run(*args, **kwargs)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    verb.callback = traced
    sys.argv = ["luthier", "train", *argv]
    with contextlib.suppress(SystemExit):
        cli.main()
    return sorted(str(Path(name).relative_to(SOURCE)) for name in files)


def _classes(path: Path) -> list[str]:
    return [n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ClassDef)]


def main() -> None:
    model, run = sys.argv[1:]
    argv = ["--model", model, "--data", str(personas.TRAIN), "--output-dir", run, "--set", "model.dtype=float32"]
    for setting in (f"data.eval=[{personas.HELD_OUT}]", "train.max_steps=2", "train.eval_time_ratio=10"):
        argv += ["--set", setting]
    out, sys.stdout = sys.stdout, sys.stderr
    names = called(argv)
    print(json.dumps(names), file=out)


if __name__ == "__main__":
    main()
