"""Validate requests of OpenAI's protocol, and build the JSON of errors (``replies`` builds that of replies).

Source: the public API reference of OpenAI (chat completions, legacy completions, models, errors). A setting that
would be ignored is refused, unless its value has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from luthier.errors import UserError
from luthier.inference.sampling import Sampling, random_seed
from luthier.serving.requests import QueueFull
from luthier.types import Message

_NEUTRAL: dict[str, tuple[object, ...]] = {  # unsupported settings, and the values of them that have no effect
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
_LABELS = (  # these do not affect the reply
    *("user", "metadata", "safety_identifier", "store", "service_tier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)


class RequestError(UserError):
    """A request that cannot be answered. status: HTTP status; param, code: as in OpenAI's error objects."""

    def __init__(
        self, message: str, fix: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, fix)
        self.status, self.param, self.code = status, param, code


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: object = None  # does not affect the reply


class ChatMessage(_Strict):
    """A message. A client may send replies back as it got them, so the empty fields of replies are accepted."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None  # chat templates have no place for it
    refusal: None = None
    tool_calls: list[None] | None = Field(None, max_length=0)
    function_call: None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(_Strict):
    """The settings that both kinds of requests have.

    top_k, repetition_penalty and no_repeat_ngram_size are not part of OpenAI's API.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_unsupported_settings(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        unsupported = [k for k, neutral in _NEUTRAL.items() if values.get(k) is not None and values[k] not in neutral]
        if unsupported:
            raise ValueError(f"{', '.join(unsupported)}: not supported by this server, leave it out")
        return {k: v for k, v in values.items() if k not in _NEUTRAL and k not in _LABELS}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is not None and (len(stops) > 4 or not all(stops)):
            raise ValueError("must be at most four strings, none of them empty")
        return stops

    @property
    def stops(self) -> Sequence[str]:
        return self.stop or ()

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, own: Sampling, max_new_tokens: int | None) -> Sampling:
        """Return the sampling settings of the run, overridden by those of the request. Raises ConfigError.

        own: the settings of the run. max_new_tokens: the limit of the request, None to use the run's.
        With temperature 0, top_p and top_k are ignored. If the request sets top_p or top_k without a temperature and
        the run is greedy, the temperature is 1, the protocol's default.
        """
        temperature, top_p, top_k = self.temperature, self.top_p, self.top_k
        if temperature is None and own.temperature == 0 and (top_p not in (None, 1) or top_k):
            temperature = 1.0
        if (own.temperature if temperature is None else temperature) == 0:
            top_p = top_k = None
        return own.changed(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=random_seed() if self.seed is None else self.seed,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )


class ChatRequest(_Common):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: set only one of them")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self, system: str | None) -> list[Message]:
        """Return the messages, with the run's system prompt if the request has none.

        Raises RequestError unless user and assistant messages alternate and end with a user message.
        """
        messages = [Message("system" if m.role == "developer" else m.role, m.text) for m in self.messages]
        if messages[0].role != "system" and system:
            messages.insert(0, Message("system", system))
        turns = messages[1:] if messages[0].role == "system" else messages
        expected = ["user", "assistant"] * len(turns)
        if not turns or [m.role for m in turns] != expected[: len(turns)] or turns[-1].role != "user":
            raise RequestError(
                f"messages: the roles are {', '.join(m.role for m in self.messages)}",
                "send an optional system message, then user and assistant messages in turn, ending with a user message",
                param="messages",
            )
        return messages


class CompletionRequest(_Common):
    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens or 16  # the protocol's default

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def text(self) -> str | None:
        """The prompt, None if it consists of token ids. Raises RequestError if there are several prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and all(isinstance(p, int) for p in self.prompt):
            return None
        if len(self.prompt) != 1:
            raise RequestError(
                f"prompt: contains {len(self.prompt)} prompts",
                "send one prompt per request; the server batches concurrent requests",
                param="prompt",
            )
        return str(self.prompt[0])


R = TypeVar("R", bound=_Common)


def parse(kind: type[R], body: bytes) -> R:
    """Parse and validate the body of a request. Raises RequestError listing every problem."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        problems = [
            (".".join(str(p) for p in one["loc"]), one["msg"].removeprefix("Value error, ")) for one in e.errors()
        ]
        message = "; ".join(f"{where}: {what}" if where else what for where, what in dict(problems).items())
        raise RequestError(
            f"the request is not valid: {message}", "correct the request", param=_field(*problems[0])
        ) from None


def _field(where: str, what: str) -> str | None:
    """Return the field of a problem: its place, or the first one that a message about unsupported ones names."""
    first = what.partition(":")[0].partition(",")[0]
    return where or (first if first in _NEUTRAL else None)


def status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    return 429 if isinstance(error, QueueFull) else 400 if isinstance(error, UserError) else 500


def error_body(error: Exception) -> dict[str, object]:
    """Build the JSON of an error in OpenAI's format. Details of internal errors are only logged, not sent."""
    status = status_of(error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    codes = {401: "invalid_api_key", 429: "queue_full"}
    text = f"{error.message}; {error.fix}" if isinstance(error, UserError) else "the server failed on this request"
    return {
        "error": {
            "message": text,
            "type": kinds.get(status, "invalid_request_error"),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or codes.get(status),
        }
    }
