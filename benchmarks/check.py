"""Compare the speed of ``luthier check`` with ``datasets.map`` and the tutorials' function, in rows per second.

    python benchmarks/check.py --model DIR [--data huanhuan.json] [--rows 1000000] [--mapped 30000] [--distinct]

The file repeats the rows, each with an index; ``--distinct`` also writes the index into every question and reply, so
that no text repeats. ``check`` is timed as a command, imports included, and checks the prompt prefix of every row. The
map is timed without imports, on the first rows of the file, in a separate process. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from luthier import personas
from luthier.data.loader import Loader
from luthier.errors import UserError
from recipe import encode
from workload import HERE

_CHECK = (
    "import sys\n"
    "from luthier.cli.main import main\n"
    "from luthier.devices.device import peak_rss_bytes\n"
    "sys.argv = ['luthier', 'check', '--json', '--model', sys.argv[1], '--data', sys.argv[2]]\n"
    "try: main()\n"
    "finally: print(peak_rss_bytes(), file=sys.stderr)\n"
)
_MAP = (
    f"import sys\nsys.path.insert(0, {str(HERE)!r})\n"
    "from check import mapped\nprint(mapped(sys.argv[1], sys.argv[2], int(sys.argv[3])))\n"
)


def write(to: Path, data: Path | None, count: int, distinct: bool, of: int | None = None) -> None:
    """Write ``count`` rows as JSONL, repeating the first ``of`` rows of ``data`` (None: all rows)."""
    turns = [c.messages[-2:] for c in list(Loader([data or personas.TRAIN]))[:of]]
    with to.open("w", encoding="utf-8") as f:
        for i in range(count):
            question, reply = turns[i % len(turns)]
            mark = f"{i} " if distinct else ""
            row = {"instruction": mark + question.content, "input": "", "output": mark + reply.content, "index": i}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def mapped(model: str, file: str, count: int) -> float:
    """Measure rows per second of ``datasets.map`` over the first ``count`` rows of a file."""
    disable_progress_bars()
    with open(file, encoding="utf-8") as f:
        rows = [json.loads(line) for _, line in zip(range(count), f, strict=False)]
    ds = Dataset.from_list(rows)
    function = partial(encode, AutoTokenizer.from_pretrained(model))
    start = time.perf_counter()
    done = ds.map(function, remove_columns=ds.column_names)
    seconds = time.perf_counter() - start
    assert len(done) == len(rows)
    return len(rows) / seconds


def checked(model: Path, file: Path) -> tuple[dict[str, Any], float, int]:
    """Run ``luthier check --json``; return report, seconds and peak resident bytes. Raises UserError if it fails."""
    start = time.perf_counter()
    done = _python(_CHECK, model, file)
    return json.loads(done.stdout), time.perf_counter() - start, int(done.stderr.split()[-1])


def measure(model: Path, data: Path | None, rows: int, first: int, distinct: bool) -> dict[str, Any]:
    """Measure both, one after the other. Raises UserError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, data, rows, distinct)
        rate = float(_python(_MAP, model, file, first).stdout.split()[-1])
        report, seconds, peak = checked(model, file)
    return {
        "rows": report["rows"],
        "distinct": distinct,
        "check_rows_per_s": round(rows / seconds, 1),
        "map_rows_per_s": round(rate, 1),
        "ratio": round(rows / seconds / rate, 2),
        "peak_rss_bytes": peak,
    }


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"one side of the comparison failed: {done.stderr.strip()[-300:]}", "see its message")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", type=Path, help="instruction rows; default: the shipped persona")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--mapped", type=int, default=30_000, help="number of rows that the map encodes")
    parser.add_argument("--distinct", action="store_true")
    a = parser.parse_args()
    print(json.dumps(measure(a.model, a.data, a.rows, a.mapped, a.distinct)))


if __name__ == "__main__":
    main()
