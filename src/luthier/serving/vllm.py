"""The same models served by vLLM: its command line, and its process in the place of ours.

Source: vLLM's public documentation of ``vllm serve`` and of LoRA adapters.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier.errors import ConfigError, MissingPackageError
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.directory import family_of
from luthier.models.loader import quantisation
from luthier.serving.models import NamedModel, places
from luthier.templates import Turns
from luthier.types import Say

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
_KEY = "VLLM_API_KEY"


def hand_over(
    paths: Sequence[Path | str],
    host: str,
    port: int,
    api_key: str | None,
    dtype: str,
    model: Path | str | None,
    adapter: Path | str | None,
    only_print: bool,
    say: Say,
) -> None:
    """Print the command; unless ``only_print``, become it. Raises UserError where vLLM cannot serve the same."""
    found = places(paths, model, adapter)
    argv = command(found, host, port, dtype)
    for note in notes(found):
        say(f"note: {note}")
    shown = shlex.join(argv)
    if only_print:
        print(f"{_KEY}={shlex.quote(api_key) if api_key else 'KEY'} {shown}")
        return
    say(shown)
    program = shutil.which("vllm")
    if program is None:
        raise MissingPackageError("vLLM is not installed here", "pip install vllm, or leave --engine vllm out")
    key = api_key or secrets.token_urlsafe(24)
    if api_key is None:
        say(f"API key: {key}")
    os.execve(program, argv, {**os.environ, _KEY: key})  # noqa: S606 - no shell: that is the point


def command(found: Sequence[NamedModel], host: str, port: int, dtype: str) -> list[str]:
    """``vllm serve`` for these places; the key is not in it, since everybody can read a command line."""
    base = found[-1]
    family = family_of(base.base)
    if family.layer_rules is not None:
        raise ConfigError(
            f"{base.base}: vLLM needs the model's own code for this layout, which luthier never runs",
            f"write a plain model first: luthier merge {found[0].name} --output-dir merged, then serve that",
        )
    if theta := found[0].rope_theta:
        raise ConfigError(f"{found[0].name}: vLLM would not use its rope_theta {theta:g}", "leave --engine vllm out")
    argv = ["vllm", "serve", str(base.base), "--host", host, "--port", str(port), "--dtype", dtype]
    argv += ["--served-model-name", base.name]
    tuned = [p.tuned for p in found if p.tuned]
    if tuned:
        ranks = [c.r for t in tuned for c in (t.adapter.lora, *t.adapter.configs.values())]
        rank = next((r for r in _RANKS if r >= max(ranks)), max(ranks))
        argv += ["--enable-lora", "--max-loras", str(len(tuned)), "--max-lora-rank", str(rank), "--lora-modules"]
        argv += [f"{p.name}={p.tuned.adapter.path}" for p in found if p.tuned]
    spoken = _chat_format(found)
    if spoken.tokenizer.chat_template is None and isinstance(spoken.template, Turns):
        argv += ["--chat-template", spoken.template.jinja()]
    return argv


def notes(found: Sequence[NamedModel]) -> list[str]:
    """What vLLM does otherwise than luthier."""
    said = [
        f"vLLM sends no system prompt of its own: requests to {p.name} must begin with {p.tuned.system!r}"
        for p in found
        if p.tuned and p.tuned.system
    ]
    if any(quantisation(p.settings) for p in found):
        said.append("the base was quantised in training; vLLM computes with its whole weights")
    return said


def _chat_format(found: Sequence[NamedModel]) -> ChatFormat:
    tuned = found[0].tuned
    return tuned.chat_format() if tuned else load_chat_format(found[0].base)
