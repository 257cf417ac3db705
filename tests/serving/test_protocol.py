"""Requests of OpenAI's protocol: what would not change the reply is accepted, everything else refused by name."""

from __future__ import annotations

import json
from itertools import zip_longest
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from luthier.inference.sampling import Sampling
from luthier.serving.protocol import ChatRequest, RequestError, parse

ASK: list[dict[str, Any]] = [{"role": "user", "content": "Who are you?"}]
HARMLESS: dict[str, list[Any]] = {  # fields of OpenAI's schema, and values that would not change the reply
    "n": [1, None],
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0, None],
    "logit_bias": [{}, None],
    "tools": [[], None],
    "tool_choice": ["none", "auto", None],
    "functions": [[], None],
    "function_call": ["none", "auto", None],
    "parallel_tool_calls": [True, False, None],
    "response_format": [{"type": "text"}, None],
    "modalities": [["text"], None],
    "audio": [None],
    "reasoning_effort": ["none", None],
    "verbosity": ["medium", None],
    "web_search_options": [None],
    "moderation": [None],
    "user": ["me", None],
    "metadata": [{"a": "b"}, None],
    "store": [True, False, None],
    "service_tier": ["auto", "flex", None],
    "safety_identifier": ["me", None],
    "prediction": [{"type": "content", "content": "I am"}, None],
    "prompt_cache_key": ["a", None],
    "prompt_cache_options": [{"mode": "explicit"}, None],
    "prompt_cache_retention": ["24h", None],
    "seed": [3, None],
    "stop": [[], None],
    "logprobs": [False, None],
    "top_logprobs": [0, None],
    "max_completion_tokens": [24, None],
    "top_p": [1, None],
    "stream": [False, None],
    "stream_options": [{"include_usage": None, "include_obfuscation": None}, None],
}
PLAIN: dict[str, Any] = {"model": "marlow", "messages": ASK, "temperature": 0, "max_tokens": 24}


def request(**changes: object) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**PLAIN, **changes}).encode())


def meaning(asked: ChatRequest) -> list[object]:
    """Return everything of a request that the reply depends on; a greedy reply does not depend on the seed."""
    sampling = asked.sampling(Sampling(), asked.max_new_tokens).changed(seed=0)
    return [asked.model, asked.conversation("Be kind."), sampling, list(asked.stops), asked.logprob_count,
            bool(asked.stream), asked.usage_wanted]  # fmt: skip


def test_every_field_of_the_protocol_is_accepted_if_it_would_not_change_the_reply() -> None:
    assert CompletionCreateParamsBase.__annotations__.keys() <= HARMLESS.keys() | PLAIN.keys()
    for values in zip_longest(*HARMLESS.values()):
        assert meaning(request(**dict(zip(HARMLESS, values, strict=True)))) == meaning(request())


def test_a_message_with_a_name_and_a_reply_that_is_sent_back_are_accepted() -> None:
    reply = {"role": "assistant", "content": "Marlow."}
    plain = meaning(request(messages=[*ASK, reply, *ASK]))
    null = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    parts = [{"type": "text", "text": "Marlow.", "prompt_cache_breakpoint": {"type": "default"}}]
    for changes in (null, {**null, "annotations": [], "tool_calls": []}, {"content": parts, "name": None}):
        named = {**ASK[0], "name": "Ann"}
        assert meaning(request(messages=[named, {**reply, **changes}, *ASK])) == plain
    with pytest.raises(RequestError, match=r"messages.1.tool_calls"):
        request(messages=[*ASK, {**reply, "tool_calls": [{"id": "a"}]}, *ASK])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("logit_bias", {"5": 9}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("moderation", {"model": "omni"}),
    ],
)
def test_a_field_that_would_change_the_reply_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{field}: not supported by this server, leave it out") as e:
        request(**{field: value})
    assert e.value.param == field


def test_the_parameter_of_an_error_is_a_field() -> None:
    for changes, param in (
        ({"n": 2, "tools": [{}]}, "n"),
        ({"temperature": 9}, "temperature"),
        ({"top_logprobs": 3}, None),
    ):
        with pytest.raises(RequestError) as e:
            request(**changes)
        assert e.value.param == param
