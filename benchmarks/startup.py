"""Measure the time from a command of luthier to its first step or its first token.

    python benchmarks/startup.py --model DIR --data huanhuan.json [--repeats 3] [--quantised] [--set KEY=VALUE]

Prints one JSON line of medians in seconds:

bare             the command ``python -c "import torch, transformers"``
cold_, warm_     ``luthier train`` with an empty and a filled cache of rows, until the first step begins, and ends
chat             ``luthier chat`` on that run, until the first token
read_once        with --quantised: all tensors of the base's quantised copy read into new memory, in one thread

--quantised trains on a 4-bit base, whose copy is kept in the user's cache.
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
from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.errors import UserError
from luthier.models.checkpoint_reader import Shards
from luthier.models.directory import read_config
from luthier.models.quantization import Quantisation
from luthier.models.quantized_loader import cache_dir
from workload import train_command


def measure(model: Path, data: Path, repeats: int, settings: list[str], quantised: bool) -> dict[str, float]:
    """Return the medians. Raises UserError if a command fails."""
    times: dict[str, list[float]] = {}

    def add(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    if quantised:
        settings = ["model.load_in_4bit=true", *settings]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if not quantised:
            env["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        # what is done once per machine or model is not measured: compiling, calibrating, verifying, quantising
        run = Path(folder) / "first"
        _train(model, data, run, f"{time.time()}", settings, env)
        _chat(run, env)
        for i in range(repeats):
            system = f"{time.time()}"  # rows with a new system prompt are not cached
            for kind in ("cold", "warm"):
                run = Path(folder) / f"{kind}-{i}"
                begins, ends = _train(model, data, run, system, settings, env)
                add(f"{kind}_until_first_step", begins)
                add(f"{kind}_with_first_step", ends)
            _chat(run, env)  # compares the replies of this adapter in two dtypes
            add("chat", _chat(run, env))
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
            add("bare", time.perf_counter() - start)
            if quantised:
                add("read_once", _read(cache_dir(model, read_config(model), Quantisation("nf4"))))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def _train(
    model: Path, data: Path, run: Path, system: str, settings: list[str], env: Mapping[str, str]
) -> tuple[float, float]:
    """Return seconds until the first step begins and until its line is printed."""
    options = [f"data.system={system}", "train.max_steps=1", "train.eval_time_ratio=0", *settings]
    start = time.perf_counter()
    command, lines = train_command(model, data, run, options), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr
        ended = 0.0
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 1/"):
                ended = time.perf_counter() - start
    if not ended:
        raise UserError(f"luthier train took no step: {''.join(lines)[-1000:]}", "see its message")
    first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return ended - first["tokens"] / first["tokens_per_s"], ended


def _chat(run: Path, env: Mapping[str, str]) -> float:
    """Return seconds until the first token."""
    command = [sys.executable, "-m", "luthier", "chat", str(run), "--prompt", "Hi", "--max-new-tokens", "1"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=env) as process:
        assert process.stdout
        process.stdout.read(1)
        return time.perf_counter() - start


def _read(copy: Path) -> float:
    """Return the seconds that reading every tensor into new memory takes."""
    shards, tensors = Shards.open(copy), list[torch.Tensor]()
    start = time.perf_counter()
    for name in shards.in_file_order():
        tensors.append(shards.read(name))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/startup.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantised", action="store_true", help="train on a 4-bit base, kept in the user's cache")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    print(json.dumps(measure(a.model.resolve(), a.data.resolve(), a.repeats, a.set, a.quantised)))


if __name__ == "__main__":
    main()
