"""The options and output of ``luthier chat``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.common import (
    AdapterOption,
    CheckpointOption,
    DtypeOption,
    FusedOption,
    JsonOption,
    ModelOption,
    QuantizationOption,
    importing,
    print_stderr,
)
from luthier.cli.conversation import InteractiveChat, ask, ask_both
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.inference.chat import Chat
    from luthier.inference.generation import Reply


NoRepeatOption = Annotated[
    int | None,
    typer.Option("--no-repeat-ngram-size", metavar="N", min=0, help="Never repeat a sequence of N tokens; 0 disables."),
]
EngineOption = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="luthier, or llama.cpp (its file is written on first use).")
]


def run(
    path: Annotated[Path | None, typer.Argument(metavar="RUN|DIR", help="A run, adapter or model directory.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Send one message and exit; - reads it from stdin.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt; default: the one used in training.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", min=0.0, help="Sampling temperature; 0: greedy.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", min=0.01, max=1.0, help="Sample from tokens of this total probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", min=0, help="Sample from the K likeliest tokens; 0: all.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", metavar="X", min=0.01, help="Penalise tokens already used; 1 disables."),
    ] = None,
    no_repeat_ngram_size: NoRepeatOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Random seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    model: ModelOption = None,
    adapter: AdapterOption = None,
    checkpoint: CheckpointOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the replies of the base model and the tuned model side by side.")
    ] = False,
    fused: FusedOption = True,
    engine: EngineOption = "luthier",
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Chat with a run, an adapter or a base model in the prompt format of its training.

    Replies follow the run's generation settings; without a run, the most likely token is always taken and a reply has
    at most 512 tokens. Options override these settings. /help lists the commands of a conversation.
    """
    if as_json and prompt is None:
        raise ConfigError("--json prints one reply, so it needs a prompt", "add --prompt TEXT")
    with importing():
        from luthier.verbs.chat import chat as open_chat

    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "give --prompt TEXT")
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    chat = open_chat(
        path, system, dtype, model, adapter, checkpoint, sampling, compare, fused, print_stderr, engine, quantization
    )
    base = chat.base_chat() if compare else None
    if prompt is None:
        InteractiveChat(chat, base).run()
    elif as_json:
        _print_json(chat, base, prompt)
    else:
        ask(chat, prompt, base)


def _print_json(chat: Chat, base: Chat | None, prompt: str) -> None:
    """Print the reply, or both models' replies, as one JSON object."""
    if base is None:
        print(json.dumps(_as_dict(chat.send(prompt))))
    else:
        replies = zip(("base", "tuned"), ask_both(chat, base, prompt), strict=True)
        print(json.dumps({name: _as_dict(reply) for name, reply in replies}))


def _as_dict(reply: Reply) -> dict[str, object]:
    return {
        "reply": reply.text,
        "stopped": reply.stopped,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": reply.reply_tokens,
        "seconds": round(reply.seconds, 3),
    }
