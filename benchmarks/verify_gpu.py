"""Verify luthier on a GPU: laws on a small random model, training, resume, chat, evaluation, merge, and two 7B shapes.

    python benchmarks/verify_gpu.py [--only SECTION ...] [--budget SECONDS] [--json FILE]

Every section (``gpu_sections.py``) runs in its own process with its own time limit and prints one JSON line; the table
at the end lists what failed and what did not run, and then the exit code is 1. Needs no network. On a machine without a
GPU it ends with "no GPU found"; ``--cpu`` runs the small sections on the CPU, to test this program.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu_sections import SECTIONS, environment, last_lines, replies


def run_section(name: str, seconds: float, gpu: bool = True) -> dict[str, Any]:
    """Run one section in its own process and return its result; a crash or a time-out is a failure of the section."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command, pipe = [sys.executable, str(Path(__file__)), "--section", name, "--folder", folder], subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=environment(gpu), start_new_session=True
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the commands that it started
            process.wait()
            result: dict[str, Any] = {"failed": [f"not finished after {seconds:.0f} s"]}
        else:
            if process.returncode == 0:
                result = json.loads(out.strip().splitlines()[-1])
            else:
                result = {"failed": [last_lines(out + err) or f"ended with exit code {process.returncode}"]}
    return {"section": name, "seconds": round(time.monotonic() - start, 1), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--budget", type=float, default=720, help="seconds for all sections together")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--cpu", action="store_true", help="run the small sections on the CPU")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--replies-of", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.replies_of:
        print(json.dumps(replies(a.replies_of)))
    elif a.section:
        print(json.dumps(SECTIONS[a.section].run(a.folder)))
    elif not torch.cuda.is_available() and not a.cpu:
        print("no GPU found")
    else:
        sys.exit(not verify(a.only, a.budget, a.cpu, a.json))


def verify(names: list[str], budget: float, cpu: bool, to: Path | None) -> bool:
    """Run sections, print their results and a table, and return whether each of them passed."""
    end, results = time.monotonic() + budget, list[dict[str, Any]]()
    for name in names:
        section, left = SECTIONS[name], end - time.monotonic()
        if cpu and section.gpu_only:
            results.append({"section": name, "seconds": 0.0, "skipped": "needs a GPU", "failed": []})
        elif left < 5:
            results.append({"section": name, "seconds": 0.0, "skipped": "no time left", "failed": ["did not run"]})
        else:
            results.append(run_section(name, min(section.seconds * (5 if cpu else 1), left), gpu=not cpu))
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    if to:
        to.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    print("\n| section | seconds | result |\n|---|---|---|")
    for r in results:
        verdict = f"did not run: {r['skipped']}" if r.get("skipped") else "; ".join(r["failed"]) or "passed"
        print(f"| {r['section']} | {r['seconds']} | {verdict} |")
    return not any(r["failed"] for r in results)


if __name__ == "__main__":
    main()
