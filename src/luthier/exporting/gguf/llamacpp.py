"""Run llama.cpp in a subprocess, so that a crash in llama.cpp does not take luthier down.

Package ``xllamacpp`` (extra ``export``) is llama.cpp's server as a library; it listens only on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from luthier.errors import ModelError

PACKAGE = "xllamacpp"


@dataclass(frozen=True, slots=True)
class Question:
    """The inputs for one GGUF file.

    chats:  conversations to write with the file's chat template.
    texts:  prompts to tokenise and to answer greedily, with at most ``tokens`` tokens each.
    stops:  token ids that must end a reply.
    lora:   file of an adapter to load over ``model``.
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
    """The outputs of llama.cpp.

    prompts, prompt_ids: text of each chat, and its token ids. ids, replies: token ids of each text and its reply.
    stops:               whether each id ends a reply.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    ids: list[list[int]]
    replies: list[list[int]]
    stops: list[bool]


def available() -> bool:
    """Whether the package that runs llama.cpp is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def ask(question: Question) -> Answer:
    """Run llama.cpp on a file. Raises ModelError if it cannot load the file or fails before it has answered."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],  # -P: import nothing from the current directory
        input=json.dumps(asdict(question), default=str),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise ModelError(
            f"{question.model}: llama.cpp cannot run this file, so it was deleted ({_reason(done)})",
            "use --to hf, which stock transformers loads",
        )
    return Answer(**json.loads(lines[-1]))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first error that llama.cpp logged, or the last line if it logged none.

    0.00.002.775 E llama_model_load: error loading model: key not found in model: llama.block_count
    0.00.002.777 E llama_model_load_from_file_impl: failed to load model
    """
    if logged := re.search(r"^[\d.]+ E +(?:\w+ +)?[\w():]+: (.+)$", done.stderr, re.MULTILINE):
        return logged[1].strip()[:200]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit status {done.returncode}"


class _Response(TypedDict, total=False):
    """The fields that are read from responses of llama.cpp's server."""

    prompt: str
    tokens: list[int]
    stop_type: str


def _serve(question: Question) -> Answer:
    """Load the file and answer, in the subprocess."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(question.model)
    params.n_ctx, params.n_parallel, params.port, params.n_gpu_layers = question.context, 1, 0, 0
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = (
            max(1, (os.cpu_count() or 2) // 2),
            0,
        )  # no busy waiting, which would starve other threads
    if question.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(question.lora), 1.0)]
    server = xllamacpp.Server(params)

    def post(path: str, body: Mapping[str, object]) -> _Response:
        request = urllib.request.Request(  # noqa: S310 - an address of this process
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:  # noqa: S310
            content: _Response = json.load(response)
        return content

    def reply(ids: Sequence[int], tokens: int, **options: object) -> _Response:
        greedy = {"prompt": ids, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return post("/completion", {**greedy, **options})

    def tokenise(text: str) -> list[int]:
        return post("/tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]

    ids = [tokenise(text) for text in question.texts]
    prompts = [post("/apply-template", {"messages": chat})["prompt"] for chat in question.chats]
    return Answer(
        prompts=prompts,
        prompt_ids=[tokenise(prompt) for prompt in prompts],
        ids=ids,
        replies=[reply(prompt, question.tokens)["tokens"] for prompt in ids],
        stops=[reply(ids[0], 2, logit_bias=[[s, 1e4]])["stop_type"] == "eos" for s in question.stops],
    )


if __name__ == "__main__":
    inputs = json.load(sys.stdin)
    inputs["model"], inputs["lora"] = Path(inputs["model"]), Path(inputs["lora"]) if inputs["lora"] else None
    answer = _serve(Question(**inputs))
    print(json.dumps(asdict(answer)), flush=True)
    os._exit(0)  # without waiting for the server's threads
