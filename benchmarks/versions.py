"""Compare the training speed of two versions of luthier, step by step in alternation.

    git worktree add /tmp/before COMMIT
    python benchmarks/versions.py /tmp/before . --model DIR --data ROWS.json --steps 40 --set lora.lora_dropout=0.1

Both versions train the same rows in a process of their own, and only one of them computes at a time: step 1 of the
first, step 1 of the second, step 2 of the second, step 2 of the first, and so on. Slow changes of the machine's speed
thus affect both alike. Prints one JSON line: the time of the second version's steps divided by that of the first one's
(median of all pairs, and sum), and whether their losses are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

import luthier
from luthier.errors import UserError

_PAUSE = 0.1  # seconds in which the threads of the version that just computed come to rest


def nested(settings: Sequence[str]) -> dict[str, Any]:
    """Convert KEY=VALUE settings with dotted keys to nested values, which every version of luthier accepts."""
    values: dict[str, Any] = {}
    for key, _, text in (setting.partition("=") for setting in settings):
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = yaml.safe_load(text)
    return values


def train(settings: Sequence[str]) -> None:
    """Train with the luthier on PYTHONPATH; after each step print a JSON line, and wait for a line on stdin."""
    began = 0.0

    def on_step(record: Any) -> None:
        nonlocal began
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": record.loss}), flush=True)
        sys.stdin.readline()
        began = time.perf_counter()

    luthier.train(luthier.build(nested(settings)), on_step=on_step, force=True)


class Version:
    """A process that trains with the code of one working tree, one step at a time."""

    def __init__(self, tree: Path, settings: Sequence[str]) -> None:
        self.tree = tree
        self.seconds: list[float] = []
        self.losses: list[float] = []
        env = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "LUTHIER_KEEP_FREED_MEMORY": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--train", *settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def _read(self) -> dict[str, float]:
        """Wait for the end of a step. Raises UserError if the process has ended."""
        output: IO[str] | None = self.process.stdout
        line = output.readline() if output else ""
        if not line.startswith("{"):
            raise UserError(f"{self.tree}: luthier.train ended before its last step", "see its message above")
        return dict(json.loads(line))

    def start(self) -> None:
        """Wait for the first step, which is not counted: its time includes loading."""
        self._read()

    def step(self) -> None:
        """Compute the next step."""
        time.sleep(_PAUSE)
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        record = self._read()
        self.seconds.append(record["seconds"])
        self.losses.append(record["loss"])


def compare(trees: tuple[Path, Path], model: Path, data: Path, steps: int, settings: Sequence[str]) -> dict[str, Any]:
    """Time ``steps`` steps of both versions in alternation, after one that is not counted. Raises UserError."""
    both: list[Version] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i, tree in enumerate(trees):
                own = [f"model.path={model}", f"data.train={data}", f"output_dir={folder}/{i}"]
                own += [f"train.max_steps={steps + 2}", "train.save_steps=1000000", "train.eval_time_ratio=0"]
                both.append(Version(tree, [*own, *settings]))
                both[-1].start()
            for i in range(steps):
                for version in both if i % 2 == 0 else both[::-1]:
                    version.step()
        finally:
            for version in both:
                version.process.kill()
                version.process.communicate()
    first, second = both
    return {
        "median": round(statistics.median(b / a for a, b in zip(first.seconds, second.seconds, strict=True)), 4),
        "sum": round(sum(second.seconds) / sum(first.seconds), 4),
        "seconds": [round(sum(version.seconds), 2) for version in both],
        "equal_losses": first.losses == second.losses,
    }


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python benchmarks/versions.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE", help="working tree of a version")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    first, second = (tree.resolve() for tree in a.trees)
    print(json.dumps(compare((first, second), a.model.resolve(), a.data.resolve(), a.steps, a.set)))


if __name__ == "__main__":
    main()
