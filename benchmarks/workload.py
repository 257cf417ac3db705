"""Define the rows that both sides train, and run each side in a separate process that prints one JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import personas
from luthier._util import files
from luthier.data.loader import Loader
from luthier.errors import UserError

SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"
MAX_LENGTH, BATCH, ACCUMULATION = 384, 8, 2
R, ALPHA, LEARNING_RATE = 8, 32, 1e-4
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Workload:
    """What every variant trains. rows: a JSON array of instruction rows. dtype: "bf16" or "fp32"."""

    model: Path
    rows: Path
    dtype: str


def write_rows(to: Path, data: Path | None, count: int) -> Path:
    """Write the first ``count`` rows of ``data`` (None: the shipped persona, repeated) as a JSON array."""
    conversations = list(Loader([data or personas.TRAIN]))
    if data is None:
        conversations = (conversations * (count // len(conversations) + 1))[:count]
    if len(conversations) < count:
        raise UserError(
            f"{data}: has {len(conversations)} rows, {count} were requested", "request fewer rows with --rows"
        )
    turns = [[m.content for m in c.messages if m.role != "system"] for c in conversations[:count]]
    rows = [{"instruction": question, "input": "", "output": reply} for question, reply, *_ in turns]
    files.write_text(to, json.dumps(rows, ensure_ascii=False))
    return to


def child(program: str, arguments: Sequence[object], threads: int | None = None) -> dict[str, Any]:
    """Run ``python benchmarks/PROGRAM.py`` and return the object in the last line that it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(HERE / f"{program}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"benchmarks/{program}.py failed with exit code {done.returncode} ({last[:300]})", "see its output"
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def train_command(model: Path, data: Path, run: Path, settings: Iterable[str]) -> list[str]:
    """Build the command ``luthier train``. settings: KEY=VALUE."""
    command = [sys.executable, "-m", "luthier", "train", "--model", str(model), "--data", str(data)]
    return [*command, "--output-dir", str(run), *(x for setting in settings for x in ("--set", setting))]
