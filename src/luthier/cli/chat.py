"""``luthier chat``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import say
from luthier.cli.options import Adapter, Checkpoint, Json, Model
from luthier.errors import ConfigError, UserError

if TYPE_CHECKING:
    from luthier.api import Chat
    from luthier.generate import Reply, Sampling


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
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="P", min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", min=0, help="Draw from the k likeliest tokens; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="auto (fp32 on CPU), float32, bfloat16 or float16.")
    ] = "auto",
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Talk to a run, an adapter or a base model, with the very prompt format of its training."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: is not a type", "use auto, float32, bfloat16 or float16")
    if as_json and prompt is None:
        raise ConfigError("--json prints one reply, so it needs a prompt", "add --prompt TEXT")
    from luthier.api import chat
    from luthier.generate import Sampling

    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "give --prompt TEXT")
    talk = chat(path, system, dtype, model, adapter, checkpoint)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if prompt is None:
        _converse(talk, sampling)
    elif as_json:
        print(json.dumps(_as_dict(talk.send(prompt, sampling))))
    else:
        _once(talk, prompt, sampling)


def _as_dict(reply: Reply) -> dict[str, Any]:
    return {
        "reply": reply.text,
        "stopped": reply.stopped,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": reply.reply_tokens,
        "seconds": round(reply.seconds, 3),
    }


def _once(talk: Chat, prompt: str, sampling: Sampling) -> None:
    reply = talk.send(prompt, sampling, lambda text: print(text, end="", flush=True))
    print()
    if not reply.stopped:
        say(f"(cut at {reply.reply_tokens} tokens; --max-new-tokens allows more)")


def _converse(talk: Chat, sampling: Sampling) -> None:
    say("Type a message; /reset starts anew, /quit ends (Ctrl-D too).")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip() in ("/quit", "/exit"):
            return
        if text.strip() == "/reset":
            talk.reset()
            say("(a new conversation)")
        elif text.strip():
            try:
                _once(talk, text, sampling)
            except UserError as e:
                say(f"error: {e}")
            except KeyboardInterrupt:
                print()
