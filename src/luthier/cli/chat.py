"""``luthier chat``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.common import Adapter, Checkpoint, Json, Model, importing
from luthier.cli.conversation import Conversation, ask, ask_both
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.inference.generation import Reply


def run(
    path: Annotated[
        Path | None, typer.Argument(metavar="RUN|DIR", help="A run, an adapter or a model directory.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Ask once and stop; - reads it from stdin.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt; default: the training's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", min=0.0, help="0: always the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", min=0.01, max=1.0, help="Nucleus sampling.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", min=0, help="Draw from the k likeliest tokens; 0: all.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", metavar="X", min=0.01, help="Above 1: said once, less likely again."),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option("--no-repeat-ngram-size", metavar="N", min=0, help="Never N tokens in a row twice; 0: off."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="auto (fp32 on CPU), float32, bfloat16 or float16.")
    ] = "auto",
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's replies beside the tuned.")] = False,
    as_json: Json = False,
) -> None:
    """Talk to a run, an adapter or a base model, with the very prompt format of its training.

    How replies are drawn: as the run's generation settings say, else the likeliest token, at most 512 of them; an
    option takes the place of its setting. /help lists the commands of a conversation.
    """
    if as_json and prompt is None:
        raise ConfigError("--json prints one reply, so it needs a prompt", "add --prompt TEXT")
    with importing():
        from luthier.verbs.chat import chat

    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "give --prompt TEXT")
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    talk = chat(path, system, dtype, model, adapter, checkpoint, given, with_adapter=compare)
    beside = talk.beside() if compare else None
    if prompt is None:
        Conversation(talk, beside).run()
    elif not as_json:
        ask(talk, prompt, beside)
    elif beside is None:
        print(json.dumps(_as_dict(talk.send(prompt))))
    else:
        replies = zip(("base", "tuned"), ask_both(talk, beside, prompt), strict=True)
        print(json.dumps({name: _as_dict(reply) for name, reply in replies}))


def _as_dict(reply: Reply) -> dict[str, Any]:
    return {
        "reply": reply.text,
        "stopped": reply.stopped,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": reply.reply_tokens,
        "seconds": round(reply.seconds, 3),
    }
