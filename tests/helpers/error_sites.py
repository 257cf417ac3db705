"""Find the error messages in the source, and record which of them the tests raised.

Covers the calls in ``src/luthier`` that create a message for the user; at run time, records which of them were made.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "luthier"
_OTHERS = (
    "ValueError",
    "TypeError",
    "AttributeError",
    "ImportError",
    "IndexError",
    "_DuplicateKeyError",
    "CacheWriteError",
)
_AT = {"_cannot": 1, "add": 1}  # index of the argument with the message; 0 for all others


@dataclass(frozen=True)
class Site:
    """A call that creates a message for the user: its place in the source, and the constant parts of the message."""

    file: str
    first: int
    last: int
    parts: tuple[str, ...]
    seen: bool  # its calls can be recorded: not for Python's own classes, whose messages become part of ours

    def __str__(self) -> str:
        return f"{self.file}:{self.first} {' ... '.join(self.parts)}"


def sites() -> Iterator[Site]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            ours = name.endswith("Error") and name not in _OTHERS
            at = _AT.get(name, 0)
            if not (ours or name in ("RowProblem", "BadRow", "_cannot", "add")) or len(node.args) <= at:
                continue
            texts = [
                c.value for c in ast.walk(node.args[at]) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            parts = tuple(t for text in texts if len(t := text.strip(" :;,.()'\"[")) >= 6)
            if parts:
                yield Site(
                    str(path.relative_to(SOURCE)),
                    node.lineno,
                    node.end_lineno or node.lineno,
                    parts,
                    not hasattr(builtins, name),
                )


class Recorder:
    """Places in the source that created a message while the tests ran, and all fixes that were offered."""

    def __init__(self) -> None:
        self.places: set[tuple[str, int]] = set()
        self.fixes: dict[str, str] = {}

    def reached(self, site: Site) -> bool:
        return any(file == site.file and site.first <= line <= site.last for file, line in self.places)

    def watch(self, owner: type, name: str = "__init__") -> None:
        """Record from where in the source ``owner.name`` is called."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def recorded(this: Any, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame is not None:  # every caller in the source, since a helper may create the error
                file = Path(frame.f_code.co_filename)
                if file.is_relative_to(SOURCE):
                    self.places.add((str(file.relative_to(SOURCE)), frame.f_lineno))
                elif frame.f_code.co_name != "recorded":
                    break
                frame = frame.f_back  # type: ignore[assignment]
            result = original(this, *args, **kwargs)
            if getattr(this, "fix", None):
                self.fixes[this.fix] = str(this)
            return result

        setattr(owner, name, recorded)


recorder = Recorder()


class SharedRecord:
    """What the processes of a parallel run (pytest-xdist) recorded: a file per process, a line per finished test."""

    def __init__(self, directory: Path, process: str) -> None:
        self._directory = directory
        self._file = directory / f"recorded-{process}.jsonl"
        self._written: tuple[set[tuple[str, int]], set[str]] = (set(), set())

    def finished(self) -> None:
        """Append what this process recorded since its last finished test."""
        places, fixes = recorder.places - self._written[0], recorder.fixes.keys() - self._written[1]
        line = json.dumps({"places": sorted(places), "fixes": {fix: recorder.fixes[fix] for fix in fixes}})
        with open(self._file, "a", encoding="utf-8") as f:
            f.write(line + "\n")
        self._written[0].update(places)
        self._written[1].update(fixes)

    def merge(self, tests: int, limit: float) -> None:
        """Wait until that many tests have finished in all processes, and add their records to ``recorder``.

        Raises TimeoutError after ``limit`` seconds.
        """
        end = time.monotonic() + limit
        while len(lines := self._lines()) < tests:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(lines)} of {tests} tests have finished")
            time.sleep(0.5)
        for line in map(json.loads, lines):
            recorder.places.update((file, number) for file, number in line["places"])
            recorder.fixes.update(line["fixes"])

    def _lines(self) -> list[str]:
        texts = [p.read_text(encoding="utf-8") for p in self._directory.glob("recorded-*.jsonl")]
        return [line for text in texts for line in text.split("\n")[:-1]]  # without a line that is being written
