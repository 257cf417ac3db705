"""Run a model's own jinja ``chat_template``, and find the replies in the text that it writes.

For every reply that is trained, the prompt rendered up to that reply must be a prefix of the rendered conversation, a
stop token must follow the reply, and the reply must be written as it is when it is the last one, which is the form that
the model writes in chat. If not (the template rewrites earlier turns, or never ends a reply), the template is refused
with the reason, because the loss mask would be a guess.

    render(history + reply)   <|im_start|>user ... <|im_start|>assistant\\n Hello <|im_end|> \\n
    render(history, prompt)   <|im_start|>user ... <|im_start|>assistant\\n
                              `------------------ read -------------------' `--- written ---' `read'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from luthier.errors import TemplateError
from luthier.types import Message, Span, TrainOn

Render = Callable[[Sequence[Message], bool], str]
_PROBE = "probe-reply"
# The date for templates that insert one (Llama 3's own fallback), so that training and chat prompts are the same.
DATE = "26 Jul 2024"
WRITTEN = "{#- Written by luthier: the chat template of the training. -#}"  # the start of every exported template


class RefusedConversation(ValueError):
    """The template itself rejects this conversation, for example because it does not support a role."""


@dataclass(frozen=True, slots=True)
class Jinja:
    """A jinja chat template.

    render: runs it, as ``render(messages, add_generation_prompt)``. source: its text, which identifies it.
    """

    render: Render
    source: str
    stop: tuple[str, ...]
    name: str = "jinja"

    def spans(self, messages: Sequence[Message], train_on: TrainOn = "all_replies") -> list[Span]:
        rendered = self._text(messages, False)
        replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if train_on == "last_reply":
            replies = replies[-1:]
        spans: list[Span] = []
        done = 0
        for i in replies:
            start, end = self._reply(messages, i, rendered, train_on)
            spans += [Span(rendered[done:start], False), Span(rendered[start:end], True)]
            done = end
        return [*spans, Span(rendered[done:], False)]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._text(messages, True)

    @property
    def markers(self) -> tuple[str, ...]:
        return self.stop

    @property
    def reply_prefix(self) -> str:
        """Text that the template puts before a reply (a space, an empty thought), detected with a probe reply."""
        history = (Message("user", "a"),)
        try:
            prompt, rendered = self.render(history, True), self.render((*history, Message("assistant", _PROBE)), False)
        except RefusedConversation:
            return ""
        if not rendered.startswith(prompt):
            return ""
        prefix, probe, _ = rendered[len(prompt) :].partition(_PROBE)
        return prefix if probe else ""

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "source": self.source}

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.render(messages, add_generation_prompt)
        first = messages[0]
        if first.role == "system" and first.content.strip() not in text:
            raise TemplateError(
                "the model's chat template omits the system prompt",
                "leave the system prompt out, or train with --set data.system_role=merge, which writes it before the "
                "first user message",
            )
        return text

    def _reply(self, messages: Sequence[Message], i: int, rendered: str, train_on: TrainOn) -> tuple[int, int]:
        """Return the start and end of the reply ``messages[i]`` in the rendered conversation, stop token included."""
        prompt = self.render(messages[:i], True)
        number = sum(m.role == "assistant" for m in messages[: i + 1])
        fix = "use a template that does not change earlier turns"
        if train_on == "all_replies" and i != len(messages) - 1:
            fix = "train the last reply of each conversation only: --set data.train_on=last_reply"
        if not rendered.startswith(prompt):
            raise TemplateError(
                f"the model's chat template writes a conversation with reply {number} differently from the prompt "
                f"before it: training text and inference prompt would not match ({_difference(prompt, rendered)})",
                fix,
            )
        ends = [(pos + len(stop), pos) for stop in self.stop if (pos := rendered.find(stop, len(prompt))) >= 0]
        if not ends:
            raise TemplateError(
                f"the model's chat template puts no stop token ({', '.join(self.stop) or 'none known'}) after a reply: "
                "a model trained on it would never stop",
                "use a template that ends replies, such as --set data.template=chatml",
            )
        end, pos = min(ends, key=lambda e: e[1])
        # the written text must be the reply, which the template may have trimmed or put a prefix before
        if not rendered[len(prompt) : pos].rstrip().endswith(messages[i].content.strip()):
            raise TemplateError(
                f"the model's chat template changes the text of reply {number}, or never ends it",
                "use another template, such as --set data.template=chatml",
            )
        as_last = rendered if i == len(messages) - 1 else self.render(messages[: i + 1], False)
        if not as_last.startswith(rendered[:pos]):
            raise TemplateError(
                f"the model's chat template writes reply {number} in another form once the conversation continues, so "
                "a model trained on it would see a form that it never writes in chat "
                f"({_difference(as_last, rendered)})",
                fix,
            )
        return len(prompt), end


def _difference(prompt: str, rendered: str) -> str:
    """Describe where two texts start to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), min(len(prompt), len(rendered))
    )
    return f"they differ from character {same}: {prompt[same : same + 30]!r} against {rendered[same : same + 30]!r}"
