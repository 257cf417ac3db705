"""A GGUF file against the tuned model: llama.cpp's own tokens on the fixed prompts, judged by the model in fp32.

luthier's prompt == the file's template == its tokens == the ids of training
reply of llama.cpp, greedy:  each token is the one that the model finds likeliest after those before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.adapters.locate import TunedModel
from luthier.errors import ModelError
from luthier.exporting.gguf import llamacpp, writer
from luthier.exporting.gguf.llamacpp import Answer, Question
from luthier.exporting.verify import chats, tuned_model
from luthier.models.chat_format import ChatFormat
from luthier.models.streamed import streamed
from luthier.types import Message, Say

TOKENS = 32  # of each reply
NEAR = {"f16": 0.02, "q8_0": 0.25, "q4_0": 0.25}  # standard deviations of the logits: a tie may fall the other way


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of ``prompts`` replies (``tokens`` in all) are a model's own greedy ones, token for token.

    furthest: the most, in logits, by which a token that llama.cpp took is behind the model's likeliest; size: the
              logits' own standard deviation.
    """

    prompts: int
    same: int
    tokens: int
    furthest: float
    size: float

    def told(self, whose: str) -> str:
        ties = (
            "" if self.same == self.prompts else f"; elsewhere at most {self.furthest:.2g} behind the likeliest token"
        )
        where = f"{self.same} of {self.prompts} prompts ({self.tokens} tokens)"
        return f"llama.cpp's greedy replies are {whose} on {where}{ties}"


def prove_model(tuned: TunedModel, chat_format: ChatFormat, file: Path, quantization: str, say: Say) -> list[str]:
    """What was proven of a whole model's file, a line each. Raises ModelError where it is not so."""
    say("asking llama.cpp")
    answer = llamacpp.ask(_question(tuned, chat_format, file))
    _same_prompts(tuned, chat_format, file, answer)
    whole = agreement(tuned_model(tuned, chat_format)[0], answer)
    if quantization == "f16":
        _within(whole, quantization, file)
        return [_PROMPTS, whole.told("those of base+adapter in fp32")]
    own = agreement(streamed(chat_format.config, writer.reader(file, chat_format.config)), answer)
    _within(own, quantization, file)
    return [
        _PROMPTS,
        own.told("those of the file's own values in fp32"),
        f"after rounding to {quantization}, they are those of base+adapter in fp32 on {whole.same} of {whole.prompts}",
    ]


def prove_lora(tuned: TunedModel, chat_format: ChatFormat, base: Path, lora: Path, say: Say) -> list[str]:
    """The same of an adapter's file over its base's. Raises ModelError."""
    say("asking llama.cpp")
    answer = llamacpp.ask(_question(tuned, chat_format, base, lora))
    _same_ids(tuned, chat_format, lora, answer)
    whole = agreement(tuned_model(tuned, chat_format)[0], answer)
    _within(whole, "f16", lora)
    return ["over the base's GGUF in f16, " + whole.told("those of base+adapter in fp32")]


@torch.no_grad()
def agreement(model: Any, answer: Answer) -> Agreement:
    """One pass over prompts and replies: a reply is the model's greedy one where each token is its likeliest next."""
    rows = [[*ids, *reply] for ids, reply in zip(answer.ids, answer.replies, strict=True)]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    hidden = model.get_decoder()(padded, use_cache=False).last_hidden_state
    head, same, furthest = model.get_output_embeddings(), 0, 0.0
    places = [one[len(ids) - 1 : len(row) - 1] for one, ids, row in zip(hidden, answer.ids, rows, strict=True)]
    logits = head(torch.cat(places)).split([len(p) for p in places])
    for found, reply in zip(logits, answer.replies, strict=True):
        behind = found.max(1).values - found.gather(1, torch.tensor(reply)[:, None])[:, 0]
        same += not bool(behind.any())
        furthest = max(furthest, float(behind.max()))
    size = float(torch.cat(logits).std())
    return Agreement(len(rows), same, sum(map(len, answer.replies)), furthest, size)


_PROMPTS = (
    "its template writes luthier's prompts, system prompt included; its tokenizer gives their ids; its stops stop"
)


def _question(tuned: TunedModel, chat_format: ChatFormat, model: Path, lora: Path | None = None) -> Question:
    asked = [[{"role": m.role, "content": m.content} for m in chat] for chat in _talks(None)]
    prompts = chats(tuned.system)
    longest = max(len(chat_format.prompt_ids(chat)) for chat in prompts)
    tokens = max(1, min(TOKENS, int(chat_format.config.max_position_embeddings) - longest))
    return Question(
        model=model,
        chats=[] if lora else asked,
        texts=[chat_format.prompt_text(chat) for chat in prompts],
        stops=[] if lora else chat_format.stop_ids[:3],
        tokens=tokens,
        context=longest + tokens + 8,
        lora=lora,
    )


def _talks(system: str | None) -> list[list[Message]]:
    """The fixed prompts, and two of them as one conversation."""
    first, second, *_ = found = chats(system)
    return [*found, [*first, Message("assistant", "I am who I am."), second[-1]]]


def _same_prompts(tuned: TunedModel, chat_format: ChatFormat, file: Path, answer: Answer) -> None:
    ours = [chat_format.prompt_text(chat) for chat in _talks(tuned.system)]
    for mine, theirs in zip(ours, answer.prompts, strict=True):
        if mine != theirs:
            raise _not_so(file, f"its template writes {theirs[:200]!r} for {mine[:200]!r}")
    _same_ids(tuned, chat_format, file, answer)
    lost = [
        chat_format.tokenizer.text_of(s)
        for s, ends in zip(chat_format.stop_ids, answer.stops, strict=False)
        if not ends
    ]
    if lost:
        raise _not_so(file, f"{', '.join(map(str, lost))} ends no reply")


def _same_ids(tuned: TunedModel, chat_format: ChatFormat, file: Path, answer: Answer) -> None:
    for chat, theirs in zip(chats(tuned.system), answer.ids, strict=True):
        ours = chat_format.prompt_ids(chat)
        if ours != theirs:
            text = chat_format.prompt_text(chat)
            raise _not_so(file, f"it splits {text[:200]!r} into other tokens: {_parting(ours, theirs)}")


def _parting(ours: Sequence[int], theirs: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{list(theirs[at : at + 5])} for {list(ours[at : at + 5])} at {at}"


def _within(found: Agreement, quantization: str, file: Path) -> None:
    bound = NEAR[quantization] * found.size
    if found.furthest > bound:
        raise _not_so(
            file,
            f"greedy replies agree on {found.same} of {found.prompts} prompts, and a token is "
            f"{found.furthest:.2g} behind the likeliest (at most {bound:.2g})",
        )


def _not_so(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file.name}: llama.cpp does not make of it what the tuned model is, so it was removed: {reason}",
        "use --to hf, which stock transformers loads",
    )
