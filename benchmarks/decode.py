"""Measure decoding: tokens per second, time to the first token and memory, for some numbers of concurrent replies.

    python benchmarks/decode.py --model DIR [--gguf FILE --llama-python PYTHON] [--wheel FILE] [--dtypes bfloat16]

luthier decodes with its compiled layers. llama.cpp runs in another interpreter, whose package ``llama_cpp`` should be
built natively from its source distribution (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python
llama-cpp-python); its system information is printed. ``--wheel`` measures a file with vocabulary in the package that
``--engine llama.cpp`` uses, over its HTTP server. Each figure comes from a process of its own; both engines choose
the most likely token and decode the same number of tokens after prompts of the same length. ``read`` is the time of a
plain read of the weights in the same process: what a step of one reply cannot be faster than.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, LONG_PROMPT = 32, 256
VOCABULARY = 30_000


def prompt(stream: int, length: int) -> list[int]:
    return [(7 + 13 * i + 101 * stream) % VOCABULARY for i in range(length)]


def figures(step: Callable[[], None], tokens: int, streams: int, first_token_s: float) -> dict[str, Any]:
    """Time ``tokens`` steps after three to warm up. The median is over steps."""
    for _ in range(3):
        step()
    times = []
    for _ in range(tokens):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {
        "tokens_per_s": streams / statistics.median(times),
        "step_ms": 1e3 * statistics.median(times),
        "first_token_s": first_token_s,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes(process: int | str = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def luthier_child(model: str, dtype: str, streams: int, tokens: int) -> dict[str, Any]:
    import torch

    from luthier.config import ModelConfig
    from luthier.inference.decoding import Reading, verified_decoding
    from luthier.models.directory import read_config
    from luthier.models.loader import open_base

    kind, _, quantised = dtype.partition("+")
    settings = {"path": model} | ({"load_in_4bit": True} if quantised == "nf4" else {})
    settings |= {"load_in_8bit": True} if quantised == "int8" else {}
    loaded = open_base(
        ModelConfig.model_validate(settings), getattr(torch, kind), torch.device("cpu"), read_config(Path(model))
    ).eval()
    decoding = verified_decoding(loaded)
    start = time.perf_counter()
    long = Reading(prompt(99, LONG_PROMPT))
    decoding.join(long)
    first_token_s = time.perf_counter() - start
    decoding.leave(long)
    rows = [Reading(prompt(i, PROMPT)) for i in range(streams)]
    for row in rows:
        row.ids.append(int(decoding.join(row).argmax()))

    def step() -> None:
        best = decoding.step().argmax(-1).tolist()
        for row, token in zip(decoding.rows, best, strict=True):
            row.ids.append(token)

    result = figures(step, tokens, streams, first_token_s)
    weights = [t for t in loaded.state_dict().values() if t.numel() > 1]
    distinct = {t.data_ptr(): t.reshape(-1).view(torch.uint8) for t in weights}
    read = []
    for _ in range(7):
        start = time.perf_counter()
        for t in distinct.values():
            start_at = -t.storage_offset() % 8  # of a tensor that is mapped from a file
            t[start_at : start_at + (len(t) - start_at) // 8 * 8].view(torch.int64).sum()
        read.append(time.perf_counter() - start)
    return result | {"read_ms": 1e3 * statistics.median(read)}


def llama_child(gguf: str, streams: int, tokens: int, threads: int) -> dict[str, Any]:
    import llama_cpp as cpp
    import numpy as np

    cpp.llama_backend_init()
    silent = cpp.llama_log_callback(_silent)
    cpp.llama_log_set(silent, None)
    model = cpp.llama_model_load_from_file(gguf.encode(), cpp.llama_model_default_params())
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    options = cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = (tokens + 2 * LONG_PROMPT) * (streams + 1), 512, 512
    options.n_seq_max, options.n_threads, options.n_threads_batch = streams + 1, threads, threads
    options.kv_unified = False
    context = cpp.llama_init_from_model(model, options)
    batch = cpp.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, sequence, whether its logits are needed); return the most likely next tokens."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        wanted_rows = [i for i, entry in enumerate(entries) if entry[3]]
        rows = [np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), (vocabulary,)) for i in wanted_rows]
        return [int(row.argmax()) for row in rows]

    def read(sequence: int, ids: list[int]) -> int:
        return decode([(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)])[0]

    start = time.perf_counter()
    read(streams, prompt(99, LONG_PROMPT))
    first_token_s = time.perf_counter() - start
    last = [read(i, prompt(i, PROMPT)) for i in range(streams)]
    position = PROMPT

    def step() -> None:
        nonlocal last, position
        last = decode([(token, position, i, True) for i, token in enumerate(last)])
        position += 1

    result = figures(step, tokens, streams, first_token_s)
    return result | {"system": cpp.llama_print_system_info().decode()}


def wheel_child(gguf: str, streams: int, tokens: int, threads: int) -> dict[str, Any]:
    """Measure the package of ``--engine llama.cpp``: requests that stream concurrently, as luthier sends them."""
    import xllamacpp

    from luthier.exporting.gguf.llamacpp import LlamaServer, ServerOptions

    context = (tokens + 2 * LONG_PROMPT) * (streams + 1)
    with LlamaServer(ServerOptions(gguf, context=context, parallel=streams, threads=threads)) as server:

        def stream(ids: list[int], count: int) -> list[float]:
            options = {"n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            events = server.stream("/completion", {"prompt": ids, **options})
            return [time.perf_counter() for event in events if event]

        start = time.perf_counter()
        first_token_s = stream(prompt(99, LONG_PROMPT), 1)[0] - start
        times: list[list[float]] = [[] for _ in range(streams)]
        threads_ = [
            threading.Thread(target=lambda i=i: times[i].extend(stream(prompt(i, PROMPT), tokens)))
            for i in range(streams)
        ]
        for thread in threads_:
            thread.start()
        for thread in threads_:
            thread.join()
        # while all of them decode
        begin, end = max(t[0] for t in times), min(t[-1] for t in times)
        decoded = sum(begin < moment <= end for t in times for moment in t)
        peak = peak_bytes(server.process_id)
    rate = decoded / (end - begin)
    figures = {"tokens_per_s": rate, "step_ms": 1e3 * streams / rate, "first_token_s": first_token_s}
    return {**figures, "peak_bytes": peak, "system": xllamacpp.get_system_info()}


def _silent(*_: object) -> None:
    """Discard a message of llama.cpp."""


def child(python: str, *arguments: object) -> dict[str, Any]:
    command = [python, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def line(name: str, streams: int, f: dict[str, Any]) -> str:
    read = f" read {f['read_ms']:.1f} ms" if "read_ms" in f else ""
    return (
        f"{name:22} {streams:3} streams: {f['tokens_per_s']:8.1f} tokens/s, {f['step_ms']:8.2f} ms a step,"
        f" first token of {LONG_PROMPT} {f['first_token_s']:.2f} s, {f['peak_bytes'] / 1e9:.2f} GB{read}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="directory of the model")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="also float32+nf4, bfloat16+int8, ..."
    )
    parser.add_argument("--gguf", nargs="*", default=[], help="files for llama.cpp")
    parser.add_argument("--wheel", nargs="*", default=[], help="files with vocabulary for the package xllamacpp")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with a native llama_cpp")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs="+", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *rest = options.child
        runs: dict[str, Callable[..., dict[str, Any]]]
        runs = {"luthier": luthier_child, "llama": llama_child, "wheel": wheel_child}
        numbers = [int(a) for a in rest if a.isdigit()]
        print(json.dumps(runs[kind](*[a for a in rest if not a.isdigit()], *numbers)))
        return
    systems: dict[str, str] = {}
    for streams in options.streams:
        for dtype in options.dtypes if options.model else ():
            arguments = ("luthier", options.model, dtype, streams, options.tokens)
            print(line(f"luthier {dtype}", streams, child(sys.executable, *arguments)), flush=True)
        for gguf in options.gguf:
            result = child(options.llama_python, "llama", gguf, streams, options.tokens, options.threads)
            systems["native"] = result["system"]
            print(line(f"llama.cpp {Path(gguf).stem[-14:]}", streams, result), flush=True)
        for gguf in options.wheel:
            result = child(sys.executable, "wheel", gguf, streams, options.tokens, options.threads)
            systems["wheel"] = result["system"]
            print(line(f"wheel {Path(gguf).stem[-14:]}", streams, result), flush=True)
    for name, system in systems.items():
        print(f"llama.cpp, {name}: {system}")


if __name__ == "__main__":
    main()
