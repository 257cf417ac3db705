"""Render chat formats that are described by fixed texts around every message.

    opening  user[0] question user[1] reply   reply_prefix answer stop[0]   gap  user[0] ...
    `----------- read, the prompt ---------'  `-------- written --------'  `read'

The texts of each model family are in a module of their own (``phi3``, ``glm4``, ...). If the stop token is also the
marker of the next user turn (GLM-4), it occurs once, written by the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from luthier.errors import TemplateError
from luthier.templates.own import require_plain
from luthier.types import Message, Span, Tools


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat format, described by its texts.

    user, system: the texts before and after a message of that role; system None: the model has no system role.
    reply:        the end of a prompt; the model continues from there.
    stop:         texts of the tokens that end a reply; a trained reply ends with the first one.
    markers:      texts that must be a single token each, including the stop tokens.
    reply_prefix: what the model writes before its answer.
    gap:          the text between a reply's stop token and the next message; never trained.
    trim:         remove white space around messages.
    """

    name: str
    user: tuple[str, str]
    reply: str
    stop: tuple[str, ...]
    markers: tuple[str, ...]
    opening: str = ""
    system: tuple[str, str] | None = None
    reply_prefix: str = ""
    gap: str = ""
    trim: bool = False

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        require_plain(messages, tools, self.name)
        spans: list[Span] = []
        pending = self.opening  # text to be read, up to the next written span
        for message, (before, written) in zip(messages, self._pieces(messages), strict=True):
            pending += before
            if written and message.trained:
                spans += [Span(pending, False), Span(written, True)]
                pending = ""
            else:
                pending += written
        return [*spans, Span(pending + self.gap, False)]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        require_plain(messages, tools, self.name)
        return self.opening + "".join(before + written for before, written in self._pieces(messages)) + self.reply

    def describe(self) -> dict[str, object]:
        return asdict(self)

    def jinja(self) -> str:
        """Return the same format as a jinja ``chat_template``, for other tools."""

        def text(value: str) -> str:
            return json.dumps(value, ensure_ascii=False)

        body = "m['content'] | trim" if self.trim else "m['content']"
        follows = "loop.first or loop.previtem['role'] != 'assistant'"
        opened = f"({text(self.user[0])} if {follows} else {text(self.gap + self.user[0].removeprefix(self.stop[0]))})"
        system = (
            f"{{{{ {text(self.system[0])} + {body} + {text(self.system[1])} }}}}"
            if self.system
            else f"{{{{ raise_exception({text(f'the {self.name} template has no system role')}) }}}}"
        )
        return (
            f"{{{{ {text(self.opening)} }}}}{{% for m in messages %}}"
            f"{{% if m['role'] == 'system' %}}{system}"
            f"{{% elif m['role'] == 'user' %}}{{{{ {opened} + {body} + {text(self.user[1])} }}}}"
            f"{{% else %}}{{{{ {text(self.reply + self.reply_prefix)} + {body} + {text(self.stop[0])} }}}}"
            f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {text(self.reply)} }}}}{{% endif %}}"
        )

    @classmethod
    def read(cls, described: Mapping[str, object]) -> Turns:
        """Rebuild a format from what ``describe`` recorded; JSON's lists become tuples. Raises TypeError."""
        create: Callable[..., Turns] = cls
        return create(**{k: tuple(v) if isinstance(v, list) else v for k, v in described.items()})

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
        """Yield for each message the text that the model reads and the text that it writes."""
        after_reply = False
        for m in messages:
            gap = self.gap if after_reply else ""
            content = m.content.strip() if self.trim else m.content
            if m.role == "assistant":
                yield gap + self.reply, self.reply_prefix + content + self.stop[0]
            else:
                before, after = self._around(m)
                if after_reply:
                    before = before.removeprefix(self.stop[0])
                yield gap + before + content + after, ""
            after_reply = m.role == "assistant"

    def _around(self, message: Message) -> tuple[str, str]:
        if message.role == "user":
            return self.user
        if self.system is None:
            raise TemplateError(
                f"the {self.name} template has no system role, so the model would not recognise a system prompt",
                "leave the system prompt out, or train with --set data.system_role=merge, which puts it into the "
                "first user message",
            )
        return self.system
