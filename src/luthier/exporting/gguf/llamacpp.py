"""llama.cpp itself, asked in a process of its own: a file that it cannot bear ends that process, not ours.

Package ``xllamacpp`` (extra ``export``) is llama.cpp's server as a library; it listens on this machine alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import ModelError

PACKAGE = "xllamacpp"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of one file.

    chats:  conversations that the file's own template writes. texts: prompts to be tokenised and answered greedily,
            with ``tokens`` tokens at most. stops: tokens that must end a reply. lora: an adapter's file over ``model``.
    """

    model: Path
    chats: Sequence[Sequence[Mapping[str, str]]]
    texts: Sequence[str]
    stops: Sequence[int]
    tokens: int
    context: int
    lora: Path | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """prompts: each chat as the template wrote it. ids, replies: of each text. stops: whether each ended a reply."""

    prompts: list[str]
    ids: list[list[int]]
    replies: list[list[int]]
    stops: list[bool]


def available() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def ask(question: Question) -> Answer:
    """Raises ModelError where llama.cpp does not load the file, or does not get to an answer."""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in _fields(question).items()}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],  # nothing from the directory that the user stands in
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        told = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise ModelError(
            f"{question.model}: llama.cpp does not run it, so it was removed ({told[-1].strip()[:200]})",
            "use --to hf, which stock transformers loads",
        )
    return Answer(**json.loads(lines[-1]))


def _fields(question: Question) -> dict[str, Any]:
    return {name: getattr(question, name) for name in Question.__slots__}


def _serve(asked: Mapping[str, Any]) -> Answer:
    """In the child: load, ask, answer."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel, params.port, params.n_gpu_layers = asked["context"], 1, 0, 0
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = max(1, (os.cpu_count() or 2) // 2), 0  # threads that wait by spinning starve others
    if asked["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    server = xllamacpp.Server(params)

    def post(path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310 - an address of this process
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:  # noqa: S310
            return json.load(response)

    def reply(ids: Sequence[int], tokens: int, **more: Any) -> Any:
        greedy = {"prompt": ids, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return post("/completion", {**greedy, **more})

    ids = [post("/tokenize", {"content": text, "parse_special": True, "add_special": True}) for text in asked["texts"]]
    ids = [found["tokens"] for found in ids]
    return Answer(
        prompts=[post("/apply-template", {"messages": chat})["prompt"] for chat in asked["chats"]],
        ids=ids,
        replies=[reply(one, asked["tokens"])["tokens"] for one in ids],
        stops=[reply(ids[0], 2, logit_bias=[[s, 1e4]])["stop_type"] == "eos" for s in asked["stops"]],
    )


if __name__ == "__main__":
    answer = _serve(json.load(sys.stdin))
    print(json.dumps({name: getattr(answer, name) for name in Answer.__slots__}), flush=True)
    os._exit(0)  # the server's threads need no goodbye
