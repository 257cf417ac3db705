"""A model's own ``chat_template``, with spans recovered by the prefix property.

For every reply that is to be trained, the prompt rendered up to it must be a prefix of the conversation rendered
with it, and the reply must be followed by a stop token. Where that does not hold (templates that rewrite earlier
turns, or never close a reply) the template is refused with the reason: a mask would be a guess.

    render(history + reply)   <|im_start|>user ... <|im_start|>assistant\\n Hello <|im_end|> \\n
    render(history, prompt)   <|im_start|>user ... <|im_start|>assistant\\n
                              `------------------ seen -------------------' `--- written ---' `seen'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.errors import TemplateError
from luthier.types import Message, Span, TrainOn

Render = Callable[[Sequence[Message], bool], str]
_PROBE = "probe-reply"


class RefusedConversation(ValueError):
    """The template itself rejects this conversation (a role it does not know, say)."""


@dataclass(frozen=True, slots=True)
class Jinja:
    """render(messages, add_generation_prompt) -> text; source: the template's text, which identifies it."""

    render: Render
    source: str
    stop: tuple[str, ...]
    name: str = "jinja"

    def spans(self, messages: Sequence[Message], train_on: TrainOn = "all_replies") -> list[Span]:
        whole = self._text(messages, False)
        replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if train_on == "last_reply":
            replies = replies[-1:]
        spans: list[Span] = []
        done = 0
        for i in replies:
            start, end = self._reply(messages, i, whole, train_on)
            spans += [Span(whole[done:start], False), Span(whole[start:end], True)]
            done = end
        return [*spans, Span(whole[done:], False)]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._text(messages, True)

    @property
    def markers(self) -> tuple[str, ...]:
        return self.stop

    @property
    def reply_prefix(self) -> str:
        """What the template itself opens a reply with (a space, an empty thought), told from a probe."""
        history = (Message("user", "a"),)
        try:
            prompt, whole = self.render(history, True), self.render((*history, Message("assistant", _PROBE)), False)
        except RefusedConversation:
            return ""
        if not whole.startswith(prompt):
            return ""
        prefix, found, _ = whole[len(prompt) :].partition(_PROBE)
        return prefix if found else ""

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "source": self.source}

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.render(messages, add_generation_prompt)
        first = messages[0]
        if first.role == "system" and first.content.strip() not in text:
            raise TemplateError(
                "the model's chat template leaves the system prompt out",
                "leave the system prompt out, or train with --set data.system_role=merge, which writes it before the "
                "first user message",
            )
        return text

    def _reply(self, messages: Sequence[Message], i: int, whole: str, train_on: TrainOn) -> tuple[int, int]:
        prompt = self.render(messages[:i], True)
        number = sum(m.role == "assistant" for m in messages[: i + 1])
        if not whole.startswith(prompt):
            fix = "use a template that keeps history as it is"
            if train_on == "all_replies" and i != len(messages) - 1:
                fix = "train the last reply of each conversation only: --set data.train_on=last_reply"
            raise TemplateError(
                f"the model's chat template writes a conversation with reply {number} differently from the prompt "
                f"before it: training text and inference prompt would not match ({_split(prompt, whole)})",
                fix,
            )
        ends = [(pos + len(stop), pos) for stop in self.stop if (pos := whole.find(stop, len(prompt))) >= 0]
        if not ends:
            raise TemplateError(
                f"the model's chat template puts no stop token ({', '.join(self.stop) or 'none known'}) after a reply: "
                "a model trained on it would never stop",
                "use a template that ends replies, such as --set data.template=chatml",
            )
        end, pos = min(ends, key=lambda e: e[1])
        # what is written must be the reply, perhaps trimmed, perhaps after something the template opens it with
        if not whole[len(prompt) : pos].rstrip().endswith(messages[i].content.strip()):
            raise TemplateError(
                f"the model's chat template alters the text of reply {number}, or never ends it",
                "use another template, such as --set data.template=chatml",
            )
        return len(prompt), end


def _split(prompt: str, whole: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    return f"they part at character {same}: {prompt[same : same + 30]!r} against {whole[same : same + 30]!r}"
