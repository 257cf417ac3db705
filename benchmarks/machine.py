"""Describe this machine and the training speed that its matrix products by themselves would allow.

    python benchmarks/machine.py --model DIR --data ROWS.json

The limit is tokens per second if a step computed only the products of the frozen linear layers, forward and for the
gradient of the input, and those of the head at supervised positions; a prefix that all rows share counts once per step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.devices.device import DTYPES, cpu_name, physical_memory
from luthier.models.native_model import empty_model
from luthier.verbs.check import inspect
from tuned import config
from workload import ACCUMULATION, BATCH

_TOKENS = 1024  # per product
_SECONDS = 0.25  # per shape


def facts() -> dict[str, Any]:
    """Return the CPU, its instruction sets, memory and the versions of the libraries."""
    capabilities = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in names if capabilities.get(name)],
        "memory_gb": round((physical_memory() or 0) / 1e9, 1),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def limit(model: Path, data: Path, dtype: str) -> dict[str, float]:
    """Measure the limit: ``tokens_per_s``, and ``flops``, the average rate of the products in FLOP/s."""
    settings = config(model, data, data.parent / "unused", 0.0, dtype, ["data.cache=false"])
    run = inspect(settings).prepared()
    train = run.rows.train
    rows = len(train)
    tokens, supervised = sum(train.lengths()), sum(train.supervised())
    steps = -(-rows // (BATCH * ACCUMULATION))
    once = tokens - train.common(rows) * (rows - steps)
    net: Any = empty_model(run.chat_format.config)
    head = net.get_output_embeddings()
    shapes = Counter(
        (m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear) and m is not head
    )
    seconds = flops = 0.0
    work = [(shape, count * once) for shape, count in shapes.items()]
    work += [((head.in_features, head.out_features), supervised)]
    for (inside, outside), positions in work:
        seconds += positions * _per_position(inside, outside, DTYPES[{"fp32": "float32", "bf16": "bfloat16"}[dtype]])
        flops += positions * 4.0 * inside * outside
    return {"tokens_per_s": round(tokens / seconds, 1), "flops": round(flops / seconds)}


def _per_position(inside: int, outside: int, dtype: torch.dtype) -> float:
    """Measure the seconds of x W^T and dy W per position."""
    weight = torch.randn(outside, inside).to(dtype)
    x, dy = torch.randn(_TOKENS, inside).to(dtype), torch.randn(_TOKENS, outside).to(dtype)
    best = float("inf")
    end = time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(x, weight.T)
        torch.mm(dy, weight)
        best = min(best, time.perf_counter() - start)
    return best / _TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/machine.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    a = parser.parse_args()
    print(json.dumps({"machine": facts(), "limit": limit(a.model, a.data, a.dtype)}))


if __name__ == "__main__":
    main()
