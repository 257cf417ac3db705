"""Generate replies with llama.cpp: an engine for the server, and a generator for conversations.

luthier renders and encodes the prompts, as in training, and ends replies at the stop tokens of the training. llama.cpp
gets token ids, computes and samples.
"""

from __future__ import annotations

import threading
import time
from collections import abc
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from luthier.devices.device import available_memory, resident_now
from luthier.errors import ConfigError, ModelError
from luthier.exporting.gguf.architectures import notes
from luthier.exporting.gguf.cached import Wanted, cached_files, default_quantization
from luthier.exporting.gguf.llamacpp import Event, LlamaServer, LlamaStopped, ServerOptions
from luthier.inference.decoding import OutOfMemory, default_memory
from luthier.inference.generation import Reply, check_length
from luthier.inference.sampling import Sampling
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import cache_bytes, context_length
from luthier.serving.models import NamedModel, Served, chat_formats, served_models
from luthier.serving.protocol import RequestError
from luthier.serving.requests import Counts, Request, RequestQueue, Token
from luthier.serving.text import ReplyText
from luthier.types import Log, Message

_CHAT_TOKENS = 16_384  # of one conversation at most, if memory allows
_UNKNOWN = -1  # id of a token that llama.cpp does not report
_FEWEST = 256  # tokens of llama.cpp's smallest context
_HALF = 2  # bytes of a cached key or value


ENGINES = ("luthier", "llama.cpp")


def check_options(engine: str, dtype: str, fused: bool, quantization: str | None) -> None:
    """Raise ConfigError for an unknown engine, and for options that it would ignore."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: is not an engine", f"use {' or '.join(ENGINES)}")
    llama = engine == "llama.cpp"
    for option, ignored, why in (
        ("--dtype", llama and dtype != "auto", "llama.cpp's files have types of their own (--quantization)"),
        ("--no-fused", llama and not fused, "it is a setting of luthier's engine"),
        ("--quantization", not llama and quantization is not None, "it is a setting of llama.cpp's engine"),
    ):
        if ignored:
            raise ConfigError(f"{option} would be ignored: {why}", f"leave {option} out, or choose another --engine")


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """A running llama.cpp with one base model and its adapters.

    adapters: by name, in the order of the server's files. context: tokens of all sequences together.
    """

    server: LlamaServer
    adapters: tuple[str, ...]
    config: PretrainedConfig
    context: int

    def room(self, prompt: int, wanted: int) -> int:
        """Return how many tokens may follow a prompt. Raises UserError if it is too long."""
        limit = check_length(self.config, prompt)
        if prompt >= self.context:
            raise OutOfMemory(
                f"the prompt has {prompt} tokens; the memory for keys and values holds {self.context}",
                "shorten the conversation, or start luthier serve with a larger --memory",
            )
        return min(n for n in (wanted, limit and limit - prompt, self.context - prompt) if n is not None)

    def tokens_of(
        self, ids: Sequence[int], sampling: Sampling, room: int, adapter: str | None, logprobs: int | None = None
    ) -> abc.Generator[Token | Finish | None]:
        """Yield the tokens of one reply, and its end; None once a second while there is no new token.

        llama.cpp withholds the tokens of an incomplete character, and then reports only the last of them. Closing the
        generator cancels the reply. Raises ModelError.
        """
        scales = [{"id": i, "scale": float(name == adapter)} for i, name in enumerate(self.adapters)]
        body = {"prompt": list(ids), "n_predict": room, "lora": scales, **_options(sampling, self.context)}
        if logprobs is not None:
            body["n_probs"] = max(1, logprobs)
        count = 0
        with closing(self.server.stream("/completion", body)) as events:
            for event in events:
                if not event:
                    yield None
                elif event["stop"]:
                    if new := event["tokens_predicted"] - count:  # the last character is incomplete
                        yield Token(_UNKNOWN, count=new, text="")
                    yield Finish(event["stop_type"] == "eos", event["timings"]["cache_n"])
                    return
                else:
                    new = event["tokens_predicted"] - count
                    count += new
                    yield _token(event, new, logprobs)
        raise self.server.interrupted()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a reply. stopped: by a stop token. reused: prompt tokens whose keys and values were known."""

    stopped: bool
    reused: int


def open_models(
    named: Sequence[NamedModel],
    quantization: str | None = None,
    memory: int | None = None,
    parallel: int = 1,
    log: Log = lambda _: None,
) -> tuple[LlamaModel, list[Served]]:
    """Start llama.cpp with verified files, which are written if they are missing. Raises UserError.

    named:        as returned by ``resolve_models``. quantization: of the base model; None: as in training.
    memory:       limit in bytes for keys and values; None: ``inference.decoding.default_memory``.
    parallel:     sequences that are decoded together.
    """
    formats = chat_formats(named)
    # its note says that llama.cpp has no such setting; a request that asks for it is refused
    served = [replace(s, sampling=s.sampling.changed(no_repeat_ngram_size=0)) for s in served_models(named, formats)]
    settings = named[0].settings
    kind = quantization or default_quantization(settings)
    wanted = [Wanted(m.name, m.base, f, m.tuned) for m, f in zip(named, formats, strict=True)]
    for note in _notes(named, formats[0], kind):
        log(f"note: {note}")
    config = formats[0].config
    if memory is not None and memory < _FEWEST * cache_bytes(config, _HALF):
        tokens, least = memory // cache_bytes(config, _HALF), f"--memory {_FEWEST * cache_bytes(config, _HALF)}B"
        raise ConfigError(f"--memory: holds only {tokens} tokens; llama.cpp needs {_FEWEST}", f"write at least {least}")
    cached = cached_files(wanted, kind, log)
    tokens = _context(config, cached.model, memory, parallel)
    options = ServerOptions(
        str(cached.model), tuple(map(str, cached.lora.values())), tokens, parallel, threads=torch.get_num_threads()
    )
    log(f"llama.cpp: loading {cached.model}")
    return LlamaModel(LlamaServer(options), tuple(cached.lora), config, tokens), served


def _context(config: PretrainedConfig, model: Path, memory: int | None, parallel: int) -> int:
    """Return the tokens of all sequences together. llama.cpp takes the memory of their keys and values at its start.

    memory: limit in bytes; None: at most half of what is free beside the model's file. A conversation (parallel 1)
    then gets at most ``_CHAT_TOKENS``.
    """
    longest = (context_length(config) or _CHAT_TOKENS) * parallel
    if memory is None:
        free = (available_memory() - resident_now() - model.stat().st_size) / 2
        memory = int(min(default_memory(config, cache_bytes(config, _HALF)), free))
        longest = min(longest, _CHAT_TOKENS) if parallel == 1 else longest
    return max(_FEWEST, min(memory // cache_bytes(config, _HALF), longest))


def _notes(named: Sequence[NamedModel], chat_format: ChatFormat, kind: str) -> list[str]:
    """List the differences from luthier's engine that the user should know."""
    differences = list(notes(chat_format.config))
    if any(m.sampling.no_repeat_ngram_size for m in named):
        differences.append(
            "llama.cpp has no setting for generation.no_repeat_ngram_size, so its replies may repeat text"
        )
    if default_quantization(named[0].settings) != "f16":
        differences.append(
            f"the base model was quantised in training; llama.cpp uses its weights in {kind}, so its replies may differ"
        )
    return differences


def _options(s: Sampling, context: int) -> dict[str, object]:
    """Translate sampling settings: the same steps in the same order."""
    return {
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "repeat_penalty": s.repetition_penalty,
        "repeat_last_n": context,  # prompt and reply
        "seed": s.seed % (2**32 - 1),  # the largest value means a random one
        "return_tokens": True,
        "cache_prompt": True,
    }


class LlamaGenerator:
    """Generates the replies of a conversation with llama.cpp."""

    def __init__(self, llama: LlamaModel, chat_format: ChatFormat, adapter: str | None) -> None:
        self.llama, self.chat_format, self.adapter = llama, chat_format, adapter

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        base: bool = False,
    ) -> Reply:
        """Generate one reply. on_text: called with each new piece of text. base: with the adapter switched off.

        Raises UserError if the prompt is too long or llama.cpp fails.
        """
        ids = self.chat_format.prompt_ids(messages)
        room = self.llama.room(len(ids), sampling.max_new_tokens)
        text = ReplyText(self.chat_format.tokenizer, self.chat_format.template.reply_prefix)
        start, count, stopped = time.perf_counter(), 0, False
        end = None if sampling.max_seconds is None else start + sampling.max_seconds
        emit = on_text or (lambda _: None)
        with closing(self.llama.tokens_of(ids, sampling, room, None if base else self.adapter)) as tokens:
            for token in tokens:
                if isinstance(token, Finish):
                    stopped = token.stopped
                elif token:
                    count += token.count
                    if stopped := token.id in self.chat_format.stop_ids:
                        break
                    emit(text.push(token.id) if token.text is None else text.push_text(token.text, token.id))
                if end is not None and time.perf_counter() >= end:
                    break
        emit(text.end())
        return Reply(text.text, stopped, len(ids), count, time.perf_counter() - start)


class LlamaEngine:
    """Generates replies to many requests with llama.cpp, which decodes them together.

    max_batch: maximum number of requests that llama.cpp gets at a time. max_queue: maximum number of waiting requests.
    """

    def __init__(self, llama: LlamaModel, max_batch: int, max_queue: int = 64) -> None:
        self.llama = llama
        self.limit = context_length(llama.config)
        self.counts = Counts()
        self.max_batch = max_batch
        self._waiting = RequestQueue(max_queue)
        self._reserved: dict[Request, int] = {}  # tokens that each running request may have in the end
        self._wake = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    @property
    def running(self) -> int:
        return len(self._reserved)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Add a request to the queue. Raises QueueFull, and RequestError for a setting that llama.cpp does not have."""
        if request.sampling.no_repeat_ngram_size:
            param = "no_repeat_ngram_size"
            raise RequestError(f"{param}: llama.cpp has no such setting", f"leave {param} out", param=param)
        with self._wake:
            self._waiting.add(request)
            self._wake.notify()

    def start(self) -> None:
        for i in range(self.max_batch):
            thread = threading.Thread(target=self._run, name=f"luthier-llama-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """End llama.cpp, and with it all replies."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self.llama.server.close()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (request := self._next()) is not None:
            try:
                self._generate(request)
            except Exception as e:  # a failed request (llama.cpp refuses it, for example) must not end the thread
                if isinstance(e, LlamaStopped):
                    self._restart()
                if not request.cancelled and not self._closed:
                    request.on_end(e)
            finally:
                with self._wake:
                    del self._reserved[request]
                    self._wake.notify_all()

    def _restart(self) -> None:
        """Start llama.cpp again after it has ended, for later requests."""
        with self._wake:
            if not self._closed and self.llama.server.ended:
                with suppress(ModelError):  # the next request tries again
                    self.llama = replace(self.llama, server=LlamaServer(self.llama.server.options))

    def _next(self) -> Request | None:
        """Wait for a request whose tokens fit into the memory beside the running ones; None when closed."""
        with self._wake:
            while not self._closed:
                if request := self._waiting.first():
                    most = self._most(request)
                    if not self._reserved or sum(self._reserved.values()) + most <= self.llama.context:
                        self._reserved[request] = most
                        return self._waiting.take()
                self._wake.wait(1)  # a cancelled request wakes nobody
        return None

    def _most(self, request: Request) -> int:
        """Return how many tokens a request may have in the end."""
        wanted = len(request.ids) + request.sampling.max_new_tokens
        return min(n for n in (wanted, self.limit, self.llama.context) if n is not None)

    def _generate(self, request: Request) -> None:
        room = self.llama.room(len(request.ids), request.sampling.max_new_tokens)
        finish = "length"
        tokens = self.llama.tokens_of(request.ids, request.sampling, room, request.adapter, request.logprobs)
        with closing(tokens):
            for token in tokens:
                if request.cancelled:
                    return
                if isinstance(token, Finish):
                    finish, request.reused = "stop" if token.stopped else "length", token.reused
                elif token and not self._pass_on(request, token):
                    finish = "stop"
                    break
        with self._wake:
            self.counts.prompt_tokens += len(request.ids)
            self.counts.reused_tokens += request.reused
        request.on_end(finish)

    def _pass_on(self, request: Request, token: Token) -> bool:
        """Pass a token to the request; false if the reply has ended with a stop token or string."""
        with self._wake:
            self.counts.reply_tokens += token.count
            self.counts.steps += token.count
        return request.on_token(token) and token.id not in request.stop_ids


def _token(event: Event, count: int, logprobs: int | None) -> Token:
    """Read the newest token of an event. count: tokens since the last event."""
    token, text = event["tokens"][-1], event["content"] if count > 1 else None
    known = event.get("completion_probabilities")
    if logprobs is None or not known:
        return Token(token, count=count, text=text)
    top = tuple((t["id"], t["logprob"]) for t in known[-1]["top_logprobs"][:logprobs])
    return Token(token, known[-1]["logprob"], top, count, text)
