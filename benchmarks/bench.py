"""Compare the tutorials' recipe with luthier on the same rows (``make bench``).

    python benchmarks/bench.py [--rows 160] [--repeats 2] [--json FILE] [--markdown FILE] [--switches]

Every run is a separate process; variants alternate. Ratios compare medians over the repeats of ``train_seconds``,
warm-up included, and of peak resident memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from luthier import hub
from luthier._util import files
from luthier._util.installation import install_command
from luthier.devices.device import pick_device, pick_dtype
from luthier.errors import MissingPackageError, UserError
from luthier.types import Log
from tuned import switches
from workload import Workload, child, write_rows

PUBLISHED, FASTEST, OURS = "recipe as given", "recipe, fastest setting", "luthier"


def measure(work: Workload, dropouts: list[float], repeats: int, with_switches: bool, log: Log) -> dict[str, Any]:
    """Run every variant once per round, for ``repeats`` rounds, so that a change of the machine's speed affects all."""
    variants = _variants(work, dropouts, with_switches)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for round_ in range(repeats):
        for name, (module, arguments) in variants.items():
            run = child(module, arguments)
            runs[name].append(run)
            log(f"{round_ + 1}/{repeats}  {name:44} {run['tokens_per_s']:8.0f} tokens/s")
    machine = child("machine", ["--model", work.model, "--data", work.rows, "--dtype", work.dtype])
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "dtype": work.dtype,
        **machine,
        "runs": runs,
        "ratios": {f"dropout {d}": _ratios(runs, d) for d in dropouts},
    }


def _variants(work: Workload, dropouts: list[float], with_switches: bool) -> dict[str, tuple[str, list[object]]]:
    variants: dict[str, tuple[str, list[object]]] = {}
    for dropout in dropouts:
        common: list[object] = ["--model", work.model, "--data", work.rows, "--dtype", work.dtype, "--dropout", dropout]
        variants[_name(PUBLISHED, dropout)] = ("recipe", [*common, "--gradient-checkpointing"])
        variants[_name(FASTEST, dropout)] = ("recipe", common)
        variants[_name(OURS, dropout)] = ("tuned", common)
        for off in switches() if with_switches else ():
            variants[_name(f"{OURS}, {off}", dropout)] = ("tuned", [*common, "--set", off])
    return variants


def _name(what: str, dropout: float) -> str:
    return f"{what}, dropout {dropout:g}"


def _ratios(runs: dict[str, list[dict[str, Any]]], dropout: float) -> dict[str, float]:
    def median(what: str, key: str) -> float:
        return float(statistics.median(run[key] for run in runs[_name(what, dropout)]))

    ours, fastest = median(OURS, "train_seconds"), median(FASTEST, "train_seconds")
    return {
        "speed against the recipe as given": round(median(PUBLISHED, "train_seconds") / ours, 2),
        "speed against its fastest setting": round(fastest / ours, 2),
        "memory against its fastest setting": round(
            median(OURS, "peak_rss_bytes") / median(FASTEST, "peak_rss_bytes"), 3
        ),
    }


def markdown(results: dict[str, Any], command: str) -> str:
    """Format the results as Markdown."""
    m, limit = results["machine"], results["limit"]
    lines = [
        f"`{command}`, {results['date']}: {m['cores']} cores of {m['cpu']}",
        f"({', '.join(m['instructions']) or 'no vector units'}), {m['threads']} threads, {m['memory_gb']:g} GB;",
        f"torch {m['torch']}, transformers {m['transformers']}, peft {m['peft']};",
        f"{results['dtype']}; {results['rows']}.",
        "Medians; the slowest and the fastest repeat in brackets.",
        "",
        "| | tokens/s | train seconds | peak RSS, GB |",
        "|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        rates = [r["tokens_per_s"] for r in runs]
        seconds, peak = (statistics.median(r[k] for r in runs) for k in ("train_seconds", "peak_rss_bytes"))
        spread = f" ({min(rates):.0f} to {max(rates):.0f})" if len(runs) > 1 else ""
        lines.append(f"| {name} | {statistics.median(rates):.0f}{spread} | {seconds:.1f} | {peak / 1e9:.2f} |")
    lines.append(
        f"| limit: products with frozen weights only, {limit['flops'] / 1e9:.0f} GFLOP/s | "
        f"{limit['tokens_per_s']:.0f} | | |"
    )
    lines += ["", "| ratio | " + " | ".join(results["ratios"]) + " |", "|---|" + "---|" * len(results["ratios"])]
    for key in dict.fromkeys(k for ratios in results["ratios"].values() for k in ratios):
        cells = [f"{ratios[key]:g}" if key in ratios else "" for ratios in results["ratios"].values()]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/bench.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a ChatML model; default: the embedded one")
    parser.add_argument("--data", type=Path, help="instruction rows; default: the shipped persona")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dropout", type=float, action="append", help="may be repeated; default: 0.1 and 0")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: luthier's choice on this machine")
    parser.add_argument("--switches", action="store_true", help="also run luthier with each of its switches off")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    a = parser.parse_args()
    try:
        run(a)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def run(a: argparse.Namespace) -> None:
    """Run the comparison. Raises UserError if a package or the model is missing or a run fails."""
    missing = [name for name in ("datasets", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"the baseline needs the package {' and '.join(missing)}", install_command("bench"))
    model = a.model or hub.default_dir("smollm2-135m")
    if not model.is_dir():
        raise UserError(f"{model}: the model to train does not exist", "luthier pull smollm2-135m, or add --model DIR")
    bf16 = pick_dtype("auto", pick_device()) is torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.json", a.data, a.rows)
        work = Workload(model.resolve(), rows, a.dtype or ("bf16" if bf16 else "fp32"))
        dropouts = a.dropout or [0.1, 0.0]
        results = measure(work, dropouts, a.repeats, a.switches, lambda text: print(text, file=sys.stderr, flush=True))
    results["rows"] = f"the first {a.rows} rows of {a.data.name if a.data else 'the shipped persona'}"
    text = markdown(results, " ".join(["python benchmarks/bench.py", *sys.argv[1:]]))
    if a.json:
        files.write_json(a.json, results)
    if a.markdown:
        files.write_text(a.markdown, text)
    print(text, end="")


if __name__ == "__main__":
    main()
