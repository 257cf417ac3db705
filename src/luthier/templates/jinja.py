"""Run a model's own jinja ``chat_template``, and find the replies in the text that it writes.

For every reply that is trained, the prompt rendered up to that reply must be a prefix of the rendered conversation, a
stop token must follow the reply, and the reply must be written as it is when it is the last one, which is the form that
the model writes in chat. If not, the loss mask would be a guess: a template that rewrites earlier turns raises
HistoryError, and one that leaves out or changes a text raises TemplateError.

A prompt may open a thought that the template then leaves out of the conversation (DeepSeek-R1: ``<think>\\n``). The
trained reply then goes on from there: with its own thought, or with the end of an empty one. A template may write
nothing after the last reply (GLM-4.5): it then ends with the token that ends a reply in the middle of a conversation.

    render(history + reply)   <|im_start|>user ... <|im_start|>assistant\\n Hello <|im_end|> \\n
    render(history, prompt)   <|im_start|>user ... <|im_start|>assistant\\n
                              `------------------ read -------------------' `--- written ---' `read'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import HistoryError, TemplateError
from luthier.templates.completeness import OTHER_TEMPLATE, incomplete, require_context, with_fields
from luthier.templates.own import PROBE, OwnTemplate, RefusedConversation, inner_stop, is_plain, omits_system
from luthier.types import Message, Span, Template, Tools

_OPENED_THOUGHT = re.compile(r"<think>\s*\Z")  # the end of a prompt
_NO_THOUGHT = "\n</think>\n\n"  # how a reply without a thought goes on after it


@dataclass(frozen=True, slots=True)
class Jinja:
    """A model's own chat template. stop: texts of the model's stop tokens."""

    own: OwnTemplate
    stop: tuple[str, ...]
    name: str = "jinja"

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        messages = with_fields(self.own, messages)
        rendered = self._text(messages, False, tools)
        spans: list[Span] = []
        done = 0
        for i, message in enumerate(messages):
            if message.role == "assistant" and message.trained:
                reply = self._reply(messages, i, rendered, tools)
                spans += [Span(rendered[done : reply.start] + reply.opened, False), Span(reply.written, True)]
                done = reply.end
        return [*spans, Span(rendered[done:], False)]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        return self._text(with_fields(self.own, messages), True, tools)

    @property
    def markers(self) -> tuple[str, ...]:
        return self.stop

    @property
    def reply_prefix(self) -> str:
        """Text that the template puts before a reply (a space, an empty thought), detected with a probe reply."""
        messages = (Message("user", "a"), Message("assistant", PROBE))
        try:
            reply = self._reply(messages, 1, self.own.render(messages, False), ())
        except (RefusedConversation, TemplateError):
            return ""
        return reply.written.partition(PROBE)[0]

    @property
    def added_stop(self) -> str | None:
        """The stop token that ends the last reply of a conversation, if the template writes none there."""
        messages = (Message("user", "a"), Message("assistant", PROBE))
        try:
            tail = self.own.render(messages, False).rpartition(PROBE)[2]
        except RefusedConversation:
            return None
        if any(stop in tail for stop in self.stop):
            return None
        return inner_stop(self.own, self.stop, called=False)

    def describe(self) -> dict[str, object]:
        return {"name": self.name, **self.own.describe()}

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools) -> str:
        text = self.own.render(messages, add_generation_prompt, tools)
        first = messages[0]
        if first.role == "system" and first.content.strip() and omits_system(self.own):
            raise TemplateError(
                "the model's chat template omits the system prompt",
                "leave the system prompt out, or train with --set data.system_role=merge, which puts it into the "
                "first user message",
            )
        require_context(self.own, messages, tools, text)
        return text

    def _reply(self, messages: Sequence[Message], i: int, rendered: str, tools: Tools) -> _Reply:
        """Find the reply ``messages[i]`` in the rendered conversation. Raises TemplateError, HistoryError."""
        is_last = i == len(messages) - 1
        number = sum(m.role == "assistant" for m in messages[: i + 1])
        prompt = self.own.render(messages[:i], True, tools)
        thought = _OPENED_THOUGHT.search(prompt) if is_last else None
        is_prefix = rendered.startswith(prompt)
        opened = thought[0] if thought and not is_prefix else ""
        prompt = prompt.removesuffix(opened)
        if not rendered.startswith(prompt):
            raise _error(
                is_last,
                f"the model's chat template writes a conversation with reply {number} differently from the prompt "
                f"before it: training text and inference prompt would not match ({_difference(prompt, rendered)})",
            )
        pos, end, stop = self._end(messages[i], rendered, len(prompt), is_last)
        body = rendered[len(prompt) : pos]
        shown = (thought[0] if thought and is_prefix else "") + body
        if problem := incomplete(messages[i], shown, bool(opened)):
            raise _error(is_last, f"the model's chat template {problem} of reply {number}, or never ends it")
        as_last = rendered if is_last else self.own.render(messages[: i + 1], False, tools)
        if not as_last.startswith(rendered[:pos]):
            raise HistoryError(
                f"the model's chat template writes reply {number} in another form once the conversation continues, so "
                f"that a model trained on it would see a form that it never writes in chat "
                f"({_difference(as_last, rendered)})",
                _EACH_REPLY,
            )
        written = _continued(messages[i], body, opened) if opened else body
        return _Reply(len(prompt), end, opened, written + stop)

    def _end(self, reply: Message, rendered: str, start: int, is_last: bool) -> tuple[int, int, str]:
        """Return where a reply ends without its stop token and with it, and that token. Raises TemplateError."""
        ends = [(at, stop) for stop in self.stop if (at := rendered.find(stop, start)) >= 0]
        if ends:
            at, stop = min(ends)
            return at, at + len(stop), stop
        text = rendered.rstrip() if reply.content == reply.content.rstrip() else rendered
        stop = inner_stop(self.own, self.stop, bool(reply.tool_calls)) or ""
        if not stop:
            raise _error(
                is_last,
                f"the model's chat template puts no stop token ({', '.join(self.stop) or 'none known'}) after a reply: "
                "a model trained on it would never stop",
                "use a template that ends replies, such as --set data.template=chatml",
            )
        return len(text), len(rendered), stop


@dataclass(frozen=True, slots=True)
class OwnForTools:
    """A native template, and for conversations that are not plain the model's own one, which writes the same text."""

    native: Template
    jinja: Jinja

    @property
    def name(self) -> str:
        return self.native.name

    @property
    def stop(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.native.stop, *self.jinja.stop)))

    @property
    def markers(self) -> tuple[str, ...]:
        return self.native.markers

    @property
    def reply_prefix(self) -> str:
        return self.native.reply_prefix

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        return self._for(messages, tools).spans(messages, tools)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        return self._for(messages, tools).prompt(messages, tools)

    def describe(self) -> dict[str, object]:
        return {**self.native.describe(), "own": self.jinja.own.describe()}

    def _for(self, messages: Sequence[Message], tools: Tools) -> Template:
        return self.native if is_plain(messages, tools) else self.jinja


_EACH_REPLY = "train each reply in an example of its own: --set data.train_on=each_reply"


def _error(is_last: bool, message: str, fix: str = OTHER_TEMPLATE) -> TemplateError:
    """Return the error of a reply; if it is not the last one, an example of its own may solve it."""
    return TemplateError(message, fix) if is_last else HistoryError(message, _EACH_REPLY)


def _continued(reply: Message, body: str, opened: str) -> str:
    """Return what the model writes after a prompt that opened a thought. body: the reply as the template writes it."""
    text = reply.content.lstrip()
    if reply.thought:
        return f"{reply.thought.strip()}{_NO_THOUGHT}{body}"
    if text.startswith("<think>"):
        return text.removeprefix("<think>").removeprefix(opened.removeprefix("<think>"))
    if "</think>" in text:
        return reply.content
    if body.startswith("<think>"):  # an empty thought, as the template writes it
        return body.removeprefix("<think>").removeprefix(opened.removeprefix("<think>"))
    return _NO_THOUGHT + body


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply's place [start, end) in the rendered conversation, stop token included, and the text that is written.

    opened: the end of the prompt, if it opens a thought that the rendered conversation leaves out.
    """

    start: int
    end: int
    opened: str
    written: str


def _difference(prompt: str, rendered: str) -> str:
    """Describe where two texts start to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), min(len(prompt), len(rendered))
    )
    return f"they differ from character {same}: {prompt[same : same + 30]!r} against {rendered[same : same + 30]!r}"
