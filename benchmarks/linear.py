"""Train on a small and on a large file: speed and memory must not depend on the number of rows.

    python benchmarks/linear.py --model DIR [--data huanhuan.json] [--rows 1000 100000] [--steps 60]

Both files repeat the same rows, so lengths are distributed alike. Prints one JSON line: tokens per second and peak
resident memory for each size, and the ratios of the largest to the smallest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import check
from workload import child


def measure(model: Path, data: Path | None, sizes: list[int], settings: list[str]) -> dict[str, Any]:
    """Run one training per file size, each in a separate process that also encodes the rows."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            file = Path(folder) / f"{size}.jsonl"
            check.write(file, data, size, distinct=False, of=min(sizes))
            options = [x for setting in settings for x in ("--set", setting)]
            run = child("tuned", ["--model", model, "--data", file, "--dropout", 0, *options])
            results[size] = {key: run[key] for key in ("tokens", "tokens_per_s", "peak_rss_bytes")}
    small, large = results[min(sizes)], results[max(sizes)]
    return {
        "runs": results,
        "tokens_per_s": round(large["tokens_per_s"] / small["tokens_per_s"], 3),
        "peak_rss": round(large["peak_rss_bytes"] / small["peak_rss_bytes"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/linear.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", type=Path, help="instruction rows; default: the shipped persona")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    print(json.dumps(measure(a.model.resolve(), a.data, a.rows, [f"train.max_steps={a.steps}", *a.set])))


if __name__ == "__main__":
    main()
