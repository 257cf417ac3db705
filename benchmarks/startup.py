"""Measure the time from the command ``luthier train`` to its first step, with and without encoded rows on disk.

    python benchmarks/startup.py --model DIR --data huanhuan.json [--repeats 3]

Prints one JSON line: medians in seconds, for a cold and a warm cache of rows, until the first step begins and until it
ends.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from workload import train_command


def measure(model: Path, data: Path, repeats: int, settings: list[str]) -> dict[str, Any]:
    """Measure cold and warm starts. Raises UserError if the command fails."""
    times: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        _once(
            model, data, Path(folder) / "first", "0", settings
        )  # so that calibration, done once per machine, is not measured
        for i in range(repeats):
            for kind, pairs in times.items():
                pairs.append(_once(model, data, Path(folder) / f"{kind}-{i}", str(i + 1), settings))
    return {
        f"{kind}_{what}": round(statistics.median(pair[i] for pair in pairs), 2)
        for kind, pairs in times.items()
        for i, what in enumerate(("until_first_step", "with_first_step"))
    }


def _once(model: Path, data: Path, run: Path, system: str, settings: list[str]) -> tuple[float, float]:
    """Return seconds until the first step begins and until its line is printed.

    system: the system prompt; rows with a new one are not cached.
    """
    options = [f"data.system={system}", "train.max_steps=1", "train.eval_time_ratio=0", *settings]
    command = train_command(model, data, run, options)
    env = {**os.environ, "XDG_CACHE_HOME": str(run.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    begun, lines = 0.0, []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if line.startswith("model:"):
                begun = time.perf_counter() - start
            if line.startswith("step 1/"):
                return begun, time.perf_counter() - start
    raise UserError(f"luthier train took no step: {''.join(lines)[-1000:]}", "see its message")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/startup.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    print(json.dumps(measure(a.model.resolve(), a.data.resolve(), a.repeats, a.set)))


if __name__ == "__main__":
    main()
