"""Verify a GGUF file: compare llama.cpp's prompts, token ids and greedy replies with the tuned model in fp32.

prompts   the chat template in the file writes luthier's prompts, and its tokenizer gives the ids of training
replies   each token of llama.cpp's greedy replies is the most likely one of the model after the tokens before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from luthier.adapters.locate import TunedModel
from luthier.errors import ModelError
from luthier.evaluation.agreement import TOKENS, Agreement, agreement, chats
from luthier.exporting.chat_files import Probe, probes
from luthier.exporting.gguf import llamacpp, writer
from luthier.exporting.gguf.llamacpp import Answer, Question, ServerOptions
from luthier.exporting.verify import tuned_model
from luthier.models.chat_format import ChatFormat
from luthier.models.protocols import CausalLM
from luthier.models.streamed import streamed
from luthier.types import Log

NEAR = {
    "f16": 0.02,
    "q8_0": 0.25,
    "q4_0": 0.25,
}  # standard deviations of the logits: a near tie may be resolved differently


def verify_model(tuned: TunedModel, chat_format: ChatFormat, file: Path, quantization: str, log: Log) -> list[str]:
    """Verify the file of a whole model and return the results as lines. Raises ModelError if verification fails."""
    log("verifying the file with llama.cpp")
    answer = llamacpp.ask(_question(tuned, chat_format, file))
    _check_prompts(tuned, chat_format, file, answer)
    _check_stops(chat_format, file, answer)
    reference = agreement(tuned_model(tuned, chat_format)[0], answer.ids, answer.replies)
    if quantization == "f16":
        _check_agreement(reference, quantization, file)
        return [_PROMPTS, reference.summary(_REPLIES, "those of base+adapter in fp32")]
    own = agreement(streamed(chat_format.config, writer.reader(file, chat_format.config)), answer.ids, answer.replies)
    _check_agreement(own, quantization, file)
    return [
        _PROMPTS,
        own.summary(_REPLIES, "those of the file's own values in fp32"),
        f"after rounding to {quantization}, they equal those of base+adapter in fp32 on {reference.same} of "
        f"{reference.prompts}",
    ]


def verify_vocabulary(tuned: TunedModel, chat_format: ChatFormat, file: Path, with_stops: bool, log: Log) -> None:
    """Verify the prompts and token ids of a file without the weights, and its stop tokens ``with_stops``.

    Raises ModelError if that fails.
    """
    log("verifying the tokenizer and the template with llama.cpp")
    answer = llamacpp.ask(replace(_question(tuned, chat_format, file), tokens=1))
    _check_prompts(tuned, chat_format, file, answer)
    if with_stops:
        _check_stops(chat_format, file, answer)


def verify_lora(tuned: TunedModel, chat_format: ChatFormat, base: Path, lora: Path, log: Log) -> list[str]:
    """Verify the file of an adapter, loaded over the file of its base model. Raises ModelError if that fails."""
    log("verifying the adapter with llama.cpp")
    answer = llamacpp.ask(_question(tuned, chat_format, base, lora))
    _check_prompts(tuned, chat_format, lora, answer)
    reference = agreement(tuned_model(tuned, chat_format)[0], answer.ids, answer.replies)
    _check_agreement(reference, "f16", lora)
    return ["over the base model's GGUF in f16, " + reference.summary(_REPLIES, "those of base+adapter in fp32")]


def verify_served(
    chat_format: ChatFormat, system: str | None, options: ServerOptions, quantization: str, reference: CausalLM
) -> str:
    """Verify files as ``serving.llamacpp`` uses them: with prompts as token ids, and keys and values in f16.

    reference: the model in fp32 with the values of the files. Returns the result in one line. Raises ModelError.
    """
    file = Path(options.lora[0] if options.lora else options.model)
    answer = llamacpp.ask(question(chat_format, system, options))
    _check_texts(chat_format, system, file, answer)
    _check_stops(chat_format, file, answer)
    result = agreement(reference, answer.ids, answer.replies)
    _check_agreement(result, quantization, file)
    values = "in fp32" if quantization == "f16" else "of the same values in fp32"
    return result.summary(_REPLIES, f"those {values}")


def verify_served_vocabulary(chat_format: ChatFormat, system: str | None, file: Path) -> None:
    """Verify the token ids and the stop tokens of a file without the weights. Raises ModelError."""
    answer = llamacpp.ask(replace(question(chat_format, system, ServerOptions(str(file), exact=True)), tokens=1))
    _check_texts(chat_format, system, file, answer)
    _check_stops(chat_format, file, answer)


_REPLIES = "llama.cpp's greedy replies"
_PROMPTS = (
    "its template writes luthier's prompts, including the system prompt; its tokenizer gives the same ids; its stop "
    "tokens end replies"
)


def _question(tuned: TunedModel, chat_format: ChatFormat, model: Path, lora: Path | None = None) -> Question:
    """Build the inputs for llama.cpp. An adapter file has no stop tokens; its template is a file beside it."""
    options = ServerOptions(str(model), (str(lora),) if lora else (), exact=True)
    asked = question(chat_format, tuned.system, options)
    conversations = [
        [{"role": m.role, "content": m.content} for m in probe.messages] for probe in _accepted(tuned, chat_format)
    ]
    return replace(asked, chats=conversations, stops=[] if lora else asked.stops)


def question(chat_format: ChatFormat, system: str | None, options: ServerOptions) -> Question:
    """Build the inputs for llama.cpp: the fixed prompts, and no conversations for its chat template."""
    prompts = chats(system)
    longest = max(len(chat_format.prompt_ids(chat)) for chat in prompts)
    tokens = max(1, min(TOKENS, int(chat_format.config.max_position_embeddings) - longest))
    texts = [chat_format.prompt_text(chat) for chat in prompts]
    options = replace(options, context=longest + tokens + 8)
    return Question(options, [], texts, chat_format.stop_ids[:3], tokens)


def _accepted(tuned: TunedModel, chat_format: ChatFormat) -> list[Probe]:
    """Return the probe conversations that the template accepts."""
    return [probe for probe in probes(chat_format, tuned.system) if probe.prompt is not None]


def _check_prompts(tuned: TunedModel, chat_format: ChatFormat, file: Path, answer: Answer) -> None:
    """Raise ModelError unless the file's template and tokenizer give the prompts of the tuned model."""
    for probe, theirs, ids in zip(_accepted(tuned, chat_format), answer.prompts, answer.prompt_ids, strict=True):
        if (ours := probe.prompt or "") != theirs:
            raise _failed(file, f"its template writes {theirs[:200]!r} instead of {ours[:200]!r}")
        _check_ids(chat_format, file, ours, ids)
    _check_texts(chat_format, tuned.system, file, answer)


def _check_texts(chat_format: ChatFormat, system: str | None, file: Path, answer: Answer) -> None:
    """Raise ModelError unless the file's tokenizer gives the ids of the fixed prompts."""
    for chat, ids in zip(chats(system), answer.ids, strict=True):
        _check_ids(chat_format, file, chat_format.prompt_text(chat), ids)


def _check_stops(chat_format: ChatFormat, file: Path, answer: Answer) -> None:
    """Raise ModelError unless the stop tokens of the tuned model end a reply."""
    ignored = [
        chat_format.tokenizer.text_of(s)
        for s, ends in zip(chat_format.stop_ids, answer.stops, strict=False)
        if not ends
    ]
    if ignored:
        raise _failed(file, f"the stop token {', '.join(map(str, ignored))} does not end a reply")


def _check_ids(chat_format: ChatFormat, file: Path, text: str, theirs: Sequence[int]) -> None:
    """Raise ModelError unless llama.cpp tokenises a prompt as luthier does."""
    ours = list(chat_format.tokenizer.encode_batch([text])[0].ids)
    if ours != theirs:
        raise _failed(file, f"it tokenises {text[:200]!r} differently: {_first_difference(ours, theirs)}")


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{list(theirs[at : at + 5])} instead of {list(ours[at : at + 5])} at position {at}"


def _check_agreement(result: Agreement, quantization: str, file: Path) -> None:
    """Raise ModelError if a token of a reply is further below the most likely one than rounding explains."""
    if not result.near(NEAR[quantization]):
        limit = NEAR[quantization] * result.size
        raise _failed(
            file,
            f"greedy replies agree on {result.same} of {result.prompts} prompts, and a token is "
            f"{result.furthest:.2g} below the likeliest one (limit {limit:.2g})",
        )


def _failed(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file.name}: verification with llama.cpp failed, so the file was deleted: {reason}",
        "use --to hf, which stock transformers loads",
    )
