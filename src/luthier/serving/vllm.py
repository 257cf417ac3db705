"""Serve the same models with vLLM: build its command line, and replace this process with it.

Source: vLLM's public documentation of ``vllm serve`` and of LoRA adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier._util import files
from luthier._util.environment import CACHE
from luthier._util.installation import pip_install
from luthier.errors import ConfigError, MissingPackageError, UserError
from luthier.exporting import chat_files
from luthier.exporting.chat_files import template_text
from luthier.inference.sampling import Sampling
from luthier.models.chat_format import load_chat_format
from luthier.models.directory import family_of
from luthier.models.loader import quantisation
from luthier.models.tokenizer.chat_template import TEMPLATE_FILE
from luthier.serving.models import NamedModel, resolve_models
from luthier.types import Log

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts
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
    log: Log,
) -> None:
    """Report vLLM's command, and replace this process with it; with ``only_print``, print it and return.

    api_key: None chooses a random one. Raises UserError if vLLM cannot serve these models.
    """
    models = resolve_models(paths, model, adapter)
    argv = command(models, host, port, dtype) + chat_options(models)
    for note in notes(models):
        log(f"note: {note}")
    command_line = shlex.join(argv)
    if only_print:
        print(f"{_KEY}={shlex.quote(api_key) if api_key else 'KEY'} {command_line}")
        return
    log(command_line)
    program = shutil.which("vllm")
    if program is None:
        raise MissingPackageError(
            "the program vllm is not installed", f"{pip_install('vllm')}, or leave --engine vllm out"
        )
    key = api_key or secrets.token_urlsafe(24)
    if api_key is None:
        log(f"API key: {key}")
    os.execve(program, argv, {**os.environ, _KEY: key})  # noqa: S606 - on purpose without a shell


def command(models: Sequence[NamedModel], host: str, port: int, dtype: str) -> list[str]:
    """Build the ``vllm serve`` command. It leaves out the API key, since other users can read a command line.

    models: as returned by ``resolve_models``. Raises ConfigError if vLLM cannot serve them.
    """
    base = models[-1]
    family = family_of(base.base)
    if family.layer_rules is not None:
        raise ConfigError(
            f"{base.base}: vLLM needs the model's own code for this layout, which luthier never runs",
            f"merge into a standard model first: luthier merge {models[0].name} --output-dir merged, then serve that",
        )
    if theta := models[0].rope_theta:
        raise ConfigError(f"{models[0].name}: vLLM would ignore its rope_theta {theta:g}", "leave --engine vllm out")
    argv = ["vllm", "serve", str(base.base), "--host", host, "--port", str(port), "--dtype", dtype]
    argv += ["--served-model-name", base.name]
    tuned = [m.tuned for m in models if m.tuned]
    if tuned:
        ranks = [c.r for t in tuned for c in (t.adapter.lora, *t.adapter.configs.values())]
        rank = next((r for r in _RANKS if r >= max(ranks)), max(ranks))
        argv += ["--enable-lora", "--max-loras", str(len(tuned)), "--max-lora-rank", str(rank), "--lora-modules"]
        argv += [json.dumps({"name": m.name, "path": str(m.tuned.adapter.path)}) for m in models if m.tuned]
    return argv


def chat_options(models: Sequence[NamedModel]) -> list[str]:
    """Write tokenizer, template, stop ids and sampling of the training to the cache, and build the options for them.

    vLLM has one template for all models. Raises ConfigError if they were trained with different ones.
    """
    formats = [m.tuned.chat_format() for m in models if m.tuned] or [load_chat_format(models[0].base)]
    system = _shared_system(models)
    texts = [template_text(f, system) for f in formats]
    if len(set(texts)) > 1:
        raise ConfigError(
            f"{' and '.join(m.name for m in models if m.tuned)} were trained with different chat templates, and vLLM "
            "has one for all models",
            "serve them separately, each on its own --port, or leave --engine vllm out",
        )
    sampling = _shared_sampling(models)
    identity = (str(models[-1].base), formats[0].tokenizer.digest(), formats[0].stop_ids, texts[0], sampling)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:20]
    folder = files.cache_root() / "vllm" / key
    if reason := files.unwritable(folder.parent):
        raise UserError(
            f"{reason}, so vLLM cannot be handed the chat template of the training",
            f"set {CACHE} to a directory that can be written",
        )
    with files.new_dir(folder) as temp:
        chat_files.write(temp, models[-1].base, formats[0], system)
        chat_files.write_generation_config(temp, models[-1].base, formats[0], sampling)
    template = str(folder / TEMPLATE_FILE)
    # content as text, as in training: a template that loops over parts would otherwise get lists
    options = ["--tokenizer", str(folder), "--chat-template", template, "--chat-template-content-format", "string"]
    return [*options, "--generation-config", str(folder)]


def _shared_system(models: Sequence[NamedModel]) -> str | None:
    """Return the system prompt of the training if it is the same for all tuned models, else None."""
    systems = {m.tuned.system for m in models if m.tuned}
    return systems.pop() if len(systems) == 1 else None


def _shared_sampling(models: Sequence[NamedModel]) -> dict[str, object]:
    """Return vLLM's settings for the sampling of the runs if it is the same for all, else for greedy replies."""
    settings = [_generation_config(m.sampling) for m in models if m.tuned] or [_GREEDY]
    return settings[0] if all(s == settings[0] for s in settings) else _GREEDY


def _generation_config(sampling: Sampling) -> dict[str, object]:
    """Build what vLLM reads from generation_config.json, where temperature 0 is greedy.

    max_new_tokens is left out: vLLM would also cut replies to requests that ask for more.
    """
    values: dict[str, object] = {"temperature": sampling.temperature, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature:
        values |= {"do_sample": True, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return values


_GREEDY = _generation_config(Sampling())


def notes(models: Sequence[NamedModel]) -> list[str]:
    """List the differences between serving with vLLM and with luthier that the user should know."""
    tuned = [m for m in models if m.tuned]
    if shared := _shared_system(models):
        differences = [f"vLLM also adds the system prompt of the training for {models[-1].name}: {shared!r}"]
    else:
        differences = [
            f"vLLM does not add the system prompt of the training: requests to {m.name} must begin with "
            f"{m.tuned.system!r}"
            for m in tuned
            if m.tuned and m.tuned.system
        ]
    sampling = _shared_sampling(models)
    if any(_generation_config(m.sampling) != sampling for m in tuned):
        differences.append(
            "vLLM has one sampling for all models: it replies greedily, whatever the generation settings of the runs"
        )
    elif sampling != _GREEDY:
        differences.append(f"vLLM also uses the generation settings of the training for {models[-1].name}")
    if any(m.sampling.no_repeat_ngram_size for m in tuned):
        differences.append("vLLM has no setting for generation.no_repeat_ngram_size, so its replies may repeat text")
    if tuned:
        differences.append(
            "replies to requests without max_tokens may fill the context, whatever generation.max_new_tokens says"
        )
    if any(quantisation(m.settings) for m in models):
        differences.append("the base model was quantised in training; vLLM uses its unquantised weights")
    return differences
