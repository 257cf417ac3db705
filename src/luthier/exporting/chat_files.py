"""Write tokenizer and chat template for other tools, and verify that these send the prompts of the training.

A conversation must become the same token ids there as in ``luthier chat``: with and without a system message, and over
several turns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from luthier._util import files
from luthier.errors import ModelError, TemplateError
from luthier.evaluation.agreement import chats
from luthier.models.chat_format import ChatFormat, load_chat_format
from luthier.models.checkpoint_reader import read_json
from luthier.models.protocols import HfTokenizer
from luthier.models.tokenizer.chat_template import TEMPLATE_FILE
from luthier.models.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from luthier.templates.exported import chat_template
from luthier.types import Message, as_dict

_CONFIG = "tokenizer_config.json"
_OWN_CODE_KEYS = ("user_token_id", "assistant_token_id", "transformers_version")  # of other code
_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation as another tool sends it, and the text of its prompt in the training; None if that refuses it."""

    messages: Sequence[Message]
    prompt: str | None


def probes(chat_format: ChatFormat, system: str | None) -> list[Probe]:
    """Return the fixed prompts, and conversations with a system message, over several turns, and with both.

    system: the run's system prompt, which conversations without a system message get.
    """
    first, second, *_ = single = chats(None)
    talk = [*first, Message("assistant", "I am who I am."), *second, Message("assistant", " 守灯人。\n"), *first]
    thought = [*first, Message("assistant", "<think>\nWho?\n</think>\n\nI am."), *second]
    brief = [Message("system", 'Be "brief". 请简短。')]
    return [
        Probe(messages, _prompt(chat_format, messages, system))
        for messages in (*single, talk, thought, [*brief, *first], [*brief, *talk])
    ]


def _prompt(chat_format: ChatFormat, messages: Sequence[Message], system: str | None) -> str | None:
    opening = [Message("system", system)] if system and messages[0].role != "system" else []
    try:
        return chat_format.prompt_text([*opening, *messages])
    except TemplateError:
        return None


def template_text(chat_format: ChatFormat, system: str | None) -> str:
    """Build the chat template for other tools, with ``system`` as the default system prompt."""
    return chat_template(chat_format.template, chat_format.tokenizer.own_template, system)


def write(folder: Path, base: Path, chat_format: ChatFormat, system: str | None) -> None:
    """Write the tokenizer files and the chat template. Raises ModelError if stock transformers reads them differently.

    base: directory of the base model. system: the run's system prompt.
    """
    write_tokenizer(folder, base, chat_format)
    write_template(folder, chat_format, system)
    verify_stock(folder, chat_format, system)


def write_tokenizer(folder: Path, base: Path, chat_format: ChatFormat) -> None:
    """Copy the base model's tokenizer files if stock transformers and luthier read the same ids from them there.

    If not (the vocabulary needs the model's own code, or the conversion adds spaces), write a tokenizer.json that both
    read correctly.
    """
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if _reads_back(folder, chat_format):
        return
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    chat_format.tokenizer.hf.save_pretrained(folder)
    if not _reads_back(folder, chat_format):  # the class of the model's own tokenizer rebuilds it with other rules
        files.write_json(
            folder / _CONFIG, {**read_json(folder / _CONFIG), "tokenizer_class": "PreTrainedTokenizerFast"}
        )


def _reads_back(folder: Path, chat_format: ChatFormat) -> bool:
    """Whether stock transformers and luthier read the tokenizer of the training from a directory."""
    try:
        readings = Tokenizer(_stock(folder)), load_tokenizer(folder)
    except Exception:  # transformers raises many types; it cannot read these files then
        return False
    return all(t.digest() == chat_format.tokenizer.digest() for t in readings)


def write_generation_config(
    folder: Path, base: Path, chat_format: ChatFormat, sampling: Mapping[str, object] | None = None
) -> None:
    """Write the base model's generation_config.json with the stop ids of the training.

    sampling: replaces how the base model's file chooses tokens and limits replies. None keeps that.
    """
    published = {k: v for k, v in read_json(base / "generation_config.json").items() if k not in _OWN_CODE_KEYS}
    if sampling is not None:
        published = {**{k: v for k, v in published.items() if k not in _SAMPLING_KEYS}, **sampling}
    generation = GenerationConfig(**{**published, "eos_token_id": list(chat_format.stop_ids)})
    files.write_json(folder / "generation_config.json", json.loads(generation.to_json_string()))


def write_template(folder: Path, chat_format: ChatFormat, system: str | None, keep_config: bool = False) -> None:
    """Write the template as ``chat_template.jinja``, which readers prefer to any other.

    keep_config: leave the template in tokenizer_config.json, which only readers before that file use, as it is.
    """
    text = template_text(chat_format, system)
    files.write_text(folder / TEMPLATE_FILE, text)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)  # not trained
    settings = read_json(folder / _CONFIG)
    if "chat_template" in settings and not keep_config:
        files.write_json(folder / _CONFIG, {**settings, "chat_template": text})


def verify_stock(folder: Path, chat_format: ChatFormat, system: str | None) -> None:
    """Raise ModelError unless stock transformers gives the prompt ids of the training, for every probe."""
    tokenizer = _stock(folder)

    def ids(messages: Sequence[Message]) -> list[int] | None:
        try:
            encoded = tokenizer.apply_chat_template(
                list(map(as_dict, messages)), add_generation_prompt=True, return_dict=True
            )
        except Exception:  # the template's own refusal, in one of many types
            return None
        assert isinstance(encoded, Mapping)
        return list(encoded["input_ids"])

    _verify(chat_format, system, ids, "stock transformers")


def verify_own(folder: Path, chat_format: ChatFormat, system: str | None) -> None:
    """Raise ModelError unless luthier reads the model directory with the prompt ids of the training."""
    written = load_chat_format(folder)

    def ids(messages: Sequence[Message]) -> list[int] | None:
        try:
            return written.prompt_ids(messages)
        except TemplateError:
            return None

    _verify(chat_format, system, ids, "luthier")


def _verify(
    chat_format: ChatFormat,
    system: str | None,
    prompt_ids: Callable[[Sequence[Message]], list[int] | None],
    reader: str,
) -> None:
    """Compare the prompt ids of a reader of the written files with those of the training. Raises ModelError."""
    for probe in probes(chat_format, system):
        prompt = probe.prompt
        expected = None if prompt is None else list(chat_format.tokenizer.encode_batch([prompt])[0].ids)
        written = prompt_ids(probe.messages)
        if written != expected:
            roles = ", ".join(m.role for m in probe.messages)
            raise ModelError(
                f"{reader} would send another prompt than the training for a conversation of {roles}: "
                f"{_described(written, chat_format)} instead of {_described(expected, chat_format)}",
                "report this bug of luthier, with the output of luthier doctor",
            )


def _described(ids: Sequence[int] | None, chat_format: ChatFormat) -> str:
    """Describe a prompt: its text with control tokens, cut."""
    return "a refusal" if ids is None else repr("".join(chat_format.tokenizer.pieces(ids))[:200])


def _stock(folder: Path) -> HfTokenizer:
    """Open the tokenizer as stock transformers does."""
    hf: HfTokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return hf
