"""Run llama.cpp in a process of its own, so that a crash in llama.cpp does not take luthier down.

Package ``xllamacpp`` (extra ``export``) is llama.cpp's server as a library. It listens only on this machine, asks for a
random key, and ends with the process that started it.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Self, TypedDict
from urllib.parse import urlsplit

from luthier._util.installation import install_command
from luthier.errors import MissingPackageError, ModelError

PACKAGE = "xllamacpp"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How llama.cpp loads one GGUF file.

    lora:     files of adapters over ``model``; a request selects one by its index, or none.
    context:  tokens of all sequences together. parallel: sequences that are decoded together.
    exact:    keys and values in fp32, without fused attention; else in f16.
    threads:  0: half of the processor's.
    """

    model: str
    lora: tuple[str, ...] = ()
    context: int = 4096
    parallel: int = 1
    exact: bool = False
    threads: int = 0


def available() -> bool:
    """Whether the package that runs llama.cpp is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def require() -> None:
    """Raise MissingPackageError if llama.cpp is not installed."""
    if not available():
        raise MissingPackageError(f"{PACKAGE}, which runs llama.cpp, is not installed", install_command("export"))


class Probability(TypedDict):
    """A token and its log probability."""

    id: int
    logprob: float


class TokenProbability(Probability):
    """A token of a reply, and the most likely tokens at its position."""

    top_logprobs: list[Probability]


class Event(TypedDict, total=False):
    """The fields that are read from responses of llama.cpp's server. stop: whether the reply has ended."""

    prompt: str
    content: str
    tokens: list[int]
    tokens_predicted: int
    completion_probabilities: list[TokenProbability]
    stop: bool
    stop_type: str
    timings: dict[str, int]


class LlamaStopped(ModelError):
    """llama.cpp has ended, or could not load its file. reason: in its own words."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(f"{message} ({reason})", "run the same command again, or leave --engine llama.cpp out")
        self.reason = reason


class LlamaServer:
    """A running llama.cpp. Use it in a ``with`` block, or call ``close``. Raises LlamaStopped if it cannot start."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._ended: LlamaStopped | None = None
        self._key = secrets.token_urlsafe(24)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see ``close``
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],  # -P: import nothing from the current directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C interrupts a reply, not llama.cpp
        )
        self._end = weakref.finalize(self, _end, self._process, self._errors)
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({**asdict(options), "key": self._key}) + "\n")
            self._process.stdin.flush()
            line = next((line for line in self._process.stdout if line.startswith(_READY)), "")
        except BrokenPipeError:
            line = ""
        except BaseException:
            self.close()
            raise
        if not line:
            raise self._stopped(f"{options.model}: llama.cpp cannot load this file", True)
        self._address = urlsplit(line.removeprefix(_READY).strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def process_id(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End llama.cpp."""
        self._end()

    def interrupted(self) -> ModelError:
        """Return the error for a response that has ended too early, and close llama.cpp if that is why."""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return ModelError("llama.cpp did not finish its response", "run the same command again")
        return self._stopped("llama.cpp has ended")

    def _stopped(self, message: str, loading: bool = False) -> LlamaStopped:
        """Return the error for a process that has ended, the same for every thread."""
        with self._lock:
            if self._ended is None:
                status = self._process.wait()
                reason = f"signal {-status}" if status < 0 else f"exit status {status}"
                if loading:
                    self._errors.seek(0)
                    reason = _reason(self._errors.read(), reason)
                self._ended = LlamaStopped(message, reason)
                self.close()
            return self._ended

    def post(self, path: str, body: Mapping[str, object]) -> Event:
        """Send a request; returns the response. Raises ModelError if it is refused or llama.cpp has ended."""
        with self._response(path, body) as response:
            content: Event = json.loads(response.read())
        return content

    def stream(self, path: str, body: Mapping[str, object]) -> abc.Generator[Event]:
        """Yield the events of a response, and an empty one every second without any. Raises as ``post``.

        Closing the iterator early cancels the request.
        """
        with self._response(path, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"error:"):
                    raise _refused(line.removeprefix(b"error:"))
                if line.startswith(b":"):
                    yield {}
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    event: Event = json.loads(data)
                    if "error" in event:
                        raise _refused(line.removeprefix(b"data:"))
                    yield event

    @contextmanager
    def _response(self, path: str, body: Mapping[str, object]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._address.hostname or "127.0.0.1", self._address.port)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _refused(response.read())
            yield response
        except (OSError, http.client.HTTPException) as e:
            raise self.interrupted() from e
        finally:
            connection.close()


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    """End the process, which also happens when its standard input does: it must not outlive this one."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        if stream:
            with suppress(OSError):
                stream.close()


def _refused(body: bytes) -> ModelError:
    """Return the error of a response."""
    try:
        content = json.loads(body)
        reason = str(content.get("error", content).get("message", body))
    except (ValueError, AttributeError):
        reason = body.decode(errors="replace")
    return ModelError(
        f"llama.cpp refused the request: {' '.join(reason.split())[:200]}", "leave --engine llama.cpp out"
    )


def _reason(log: str, status: str) -> str:
    """Return the first error that llama.cpp logged, or the last line if it logged none, or how it ended.

    0.00.002.775 E llama_model_load: error loading model: key not found in model: llama.block_count
    0.00.002.777 E llama_model_load_from_file_impl: failed to load model
    """
    if logged := re.search(r"^[\d.]+ E +(?:\w+ +)?[\w():]+: (.+)$", log, re.MULTILINE):
        return logged[1].strip()[:200]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else status


# --- the questions of a verification --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """The inputs for one GGUF file.

    options: how to load it.
    chats:   conversations to write with the file's chat template.
    texts:   prompts to tokenise and to answer greedily, with at most ``tokens`` tokens each.
    stops:   token ids that must end a reply.
    """

    options: ServerOptions
    chats: Sequence[Sequence[Mapping[str, str]]]
    texts: Sequence[str]
    stops: Sequence[int]
    tokens: int


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


def ask(question: Question) -> Answer:
    """Run llama.cpp on a file. Raises ModelError if it cannot load the file or fails before it has answered."""
    try:
        with LlamaServer(question.options) as server:
            return _answer(server, question)
    except ModelError as e:
        reason = e.reason if isinstance(e, LlamaStopped) else e.message
        raise ModelError(
            f"{question.options.model}: llama.cpp cannot run this file ({reason})",
            "use --to hf, which stock transformers loads",
        ) from None


def _answer(server: LlamaServer, question: Question) -> Answer:
    def reply(ids: Sequence[int], tokens: int, **options: object) -> Event:
        greedy = {"prompt": ids, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return server.post("/completion", {**greedy, **options})

    def tokenise(text: str) -> list[int]:
        ids: list[int] = server.post("/tokenize", {"content": text, "parse_special": True, "add_special": True})[
            "tokens"
        ]
        return ids

    ids = [tokenise(text) for text in question.texts]
    prompts = [server.post("/apply-template", {"messages": chat})["prompt"] for chat in question.chats]
    return Answer(
        prompts=prompts,
        prompt_ids=[tokenise(prompt) for prompt in prompts],
        ids=ids,
        replies=[reply(prompt, question.tokens)["tokens"] for prompt in ids],
        stops=[reply(ids[0], 2, logit_bias=[[s, 1e4]])["stop_type"] == "eos" for s in question.stops],
    )


# --- the process of llama.cpp ---------------------------------------------------------------------------------------

_READY = "ready "


def _serve(options: ServerOptions, key: str) -> None:
    """Load the file, print the address, and serve until the standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx, params.n_parallel, params.port = options.context, options.parallel, 0
    params.api_keys = [key]
    params.kv_unified = True  # sequences share the context, each as long as it is
    params.cache_ram_mib = 0  # prompts are kept only in the context
    params.sse_ping_interval = 1
    params.warmup = params.fit_params = params.ui = False
    if options.exact:
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = options.threads or max(1, (os.cpu_count() or 2) // 2)
        cpu.poll = 0  # no busy waiting, which would starve other threads
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in options.lora]
    params.verbosity = 1  # errors only: a server runs for weeks
    server = xllamacpp.Server(params)
    print(_READY + server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    api_key = settings.pop("key")
    _serve(ServerOptions(**settings | {"lora": tuple(settings["lora"])}), api_key)
    os._exit(0)  # without waiting for the server's threads
