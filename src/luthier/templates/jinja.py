"""Run a model's own jinja ``chat_template``, and find the replies in the text that it writes.

For every reply that is trained, the prompt rendered up to that reply must be a prefix of the rendered conversation, a
stop token must follow the reply, and the reply must be written as it is when it is the last one, which is the form that
the model writes in chat. If not (the template rewrites earlier turns, or never ends a reply), the template is refused
with the reason, because the loss mask would be a guess.

A prompt may open a thought that the template then leaves out of the conversation (DeepSeek-R1: ``<think>\\n``). The
trained reply then goes on from there: with its own thought, or with the end of an empty one.

    render(history + reply)   <|im_start|>user ... <|im_start|>assistant\\n Hello <|im_end|> \\n
    render(history, prompt)   <|im_start|>user ... <|im_start|>assistant\\n
                              `------------------ read -------------------' `--- written ---' `read'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from luthier.errors import TemplateError
from luthier.types import Message, Span, TrainOn

Render = Callable[[Sequence[Message], bool], str]
_PROBE = "probe-reply"
_OPENED_THOUGHT = re.compile(r"<think>\s*\Z")  # the end of a prompt
_NO_THOUGHT = "\n</think>\n\n"  # how a reply without a thought goes on after it
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
            reply = self._reply(messages, i, rendered, train_on)
            spans += [Span(rendered[done : reply.start] + reply.opened, False), Span(reply.written, True)]
            done = reply.end
        return [*spans, Span(rendered[done:], False)]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._text(messages, True)

    @property
    def markers(self) -> tuple[str, ...]:
        return self.stop

    @property
    def reply_prefix(self) -> str:
        """Text that the template puts before a reply (a space, an empty thought), detected with a probe reply."""
        messages = (Message("user", "a"), Message("assistant", _PROBE))
        try:
            reply = self._reply(messages, 1, self.render(messages, False), "last_reply")
        except (RefusedConversation, TemplateError):
            return ""
        return reply.written.partition(_PROBE)[0]

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "source": self.source}

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.render(messages, add_generation_prompt)
        first = messages[0]
        if first.role == "system" and first.content.strip() and _omits_system(self.render, self.source):
            raise TemplateError(
                "the model's chat template omits the system prompt",
                "leave the system prompt out, or train with --set data.system_role=merge, which puts it into the "
                "first user message",
            )
        return text

    def _reply(self, messages: Sequence[Message], i: int, rendered: str, train_on: TrainOn) -> _Reply:
        """Find the reply ``messages[i]`` in the rendered conversation. Raises TemplateError."""
        prompt = self.render(messages[:i], True)
        thought = _OPENED_THOUGHT.search(prompt) if i == len(messages) - 1 else None
        is_prefix = rendered.startswith(prompt)
        opened = thought[0] if thought and not is_prefix else ""
        prompt = prompt.removesuffix(opened)
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
        content, body, stop = messages[i].content, rendered[len(prompt) : pos], rendered[pos:end]
        shown = (thought[0] if thought and is_prefix else "") + body
        answer = content.rpartition("</think>")[2] if opened else content
        nested = opened and "<think>" in content.lstrip()[1:]
        if nested or not shown.rstrip().endswith(answer.strip()):
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
        written = _continued(content, body, opened) if opened else body
        return _Reply(len(prompt), end, opened, written + stop)


def _continued(content: str, body: str, opened: str) -> str:
    """Return what the model writes after a prompt that opened a thought. body: the reply as the template writes it."""
    text = content.lstrip()
    if text.startswith("<think>"):
        return text.removeprefix("<think>").removeprefix(opened.removeprefix("<think>"))
    return content if "</think>" in content else _NO_THOUGHT + body


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply's place [start, end) in the rendered conversation, stop token included, and the text that is written.

    opened: the end of the prompt, if it opens a thought that the rendered conversation leaves out.
    """

    start: int
    end: int
    opened: str
    written: str


@lru_cache(64)
def _omits_system(render: Render, _source: str) -> bool:
    """Whether a template leaves system messages out. _source: its text, which ``render`` may get anew."""
    try:
        return _PROBE not in render((Message("system", _PROBE), Message("user", "a")), True)
    except RefusedConversation:
        return False


def _difference(prompt: str, rendered: str) -> str:
    """Describe where two texts start to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), min(len(prompt), len(rendered))
    )
    return f"they differ from character {same}: {prompt[same : same + 30]!r} against {rendered[same : same + 30]!r}"
