"""A GGUF file against the tuned model: llama.cpp's own tokens on the fixed prompts, judged by the model in fp32.

luthier's prompt == the file's template == its tokens == the ids of training
reply of llama.cpp, greedy:  each token is the one that the model finds likeliest after those before it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.errors import ModelError
from luthier.exporting import gguf, llamacpp
from luthier.exporting.llamacpp import Answer, Question
from luthier.generate import prompt_text
from luthier.located import Located
from luthier.models.streamed import streamed
from luthier.preflight import Voice
from luthier.proving import chats, tuned_model
from luthier.types import Message

TOKENS = 32  # of each reply
NEAR = {"f16": 0.02, "q8_0": 0.25, "q4_0": 0.25}  # standard deviations of the logits: a tie may fall the other way
Say = Callable[[str], None]


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


def prove_model(found: Located, voice: Voice, file: Path, quantization: str, say: Say) -> list[str]:
    """What was proven of a whole model's file, a line each. Raises ModelError where it is not so."""
    say("asking llama.cpp")
    answer = llamacpp.ask(_question(found, voice, file))
    _same_prompts(found, voice, file, answer)
    tuned = agreement(tuned_model(found, voice)[0], answer)
    if quantization == "f16":
        _within(tuned, quantization, file)
        return [_PROMPTS, tuned.told("those of base+adapter in fp32")]
    own = agreement(streamed(voice.config, gguf.reader(file, voice.config)), answer)
    _within(own, quantization, file)
    return [
        _PROMPTS,
        own.told("those of the file's own values in fp32"),
        f"after rounding to {quantization}, they are those of base+adapter in fp32 on {tuned.same} of {tuned.prompts}",
    ]


def prove_lora(found: Located, voice: Voice, base: Path, lora: Path, say: Say) -> list[str]:
    """The same of an adapter's file over its base's. Raises ModelError."""
    say("asking llama.cpp")
    answer = llamacpp.ask(_question(found, voice, base, lora))
    _same_ids(found, voice, lora, answer)
    tuned = agreement(tuned_model(found, voice)[0], answer)
    _within(tuned, "f16", lora)
    return ["over the base's GGUF in f16, " + tuned.told("those of base+adapter in fp32")]


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


def _question(found: Located, voice: Voice, model: Path, lora: Path | None = None) -> Question:
    asked = [[{"role": m.role, "content": m.content} for m in chat] for chat in _talks(None)]
    texts = [prompt_text(voice.template, chat) for chat in chats(found.system)]
    longest = max(len(e.ids) for e in voice.tokenizer.encode_batch(texts))
    tokens = max(1, min(TOKENS, int(voice.config.max_position_embeddings) - longest))
    return Question(
        model=model,
        chats=[] if lora else asked,
        texts=texts,
        stops=[] if lora else voice.stop_ids[:3],
        tokens=tokens,
        context=longest + tokens + 8,
        lora=lora,
    )


def _talks(system: str | None) -> list[list[Message]]:
    """The fixed prompts, and two of them as one conversation."""
    first, second, *_ = found = chats(system)
    return [*found, [*first, Message("assistant", "I am who I am."), second[-1]]]


def _same_prompts(found: Located, voice: Voice, file: Path, answer: Answer) -> None:
    ours = [prompt_text(voice.template, chat) for chat in _talks(found.system)]
    for mine, theirs in zip(ours, answer.prompts, strict=True):
        if mine != theirs:
            raise _not_so(file, f"its template writes {theirs[:200]!r} for {mine[:200]!r}")
    _same_ids(found, voice, file, answer)
    lost = [voice.tokenizer.text_of(s) for s, ends in zip(voice.stop_ids, answer.stops, strict=False) if not ends]
    if lost:
        raise _not_so(file, f"{', '.join(map(str, lost))} ends no reply")


def _same_ids(found: Located, voice: Voice, file: Path, answer: Answer) -> None:
    texts = [prompt_text(voice.template, chat) for chat in chats(found.system)]
    for text, ours, theirs in zip(texts, voice.tokenizer.encode_batch(texts), answer.ids, strict=True):
        if list(ours.ids) != theirs:
            raise _not_so(file, f"it splits {text[:200]!r} into other tokens: {_parting(ours.ids, theirs)}")


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
