"""Formats that are one text after another, as data: each family's own module holds its texts.

    opening  user[0] question user[1] reply   reply_prefix answer stop[0]   gap  user[0] ...
    `-------------- seen, the prompt ------'  `-------- written --------'  `seen'

Where the stop is also the next user's marker (GLM-4) it is written once: by the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.errors import TemplateError
from luthier.types import Message, Span, TrainOn


@dataclass(frozen=True, slots=True)
class Turns:
    """A format's texts.

    user, system: what stands before and after such a message; system None: the model knows no system role.
    reply:        ends a prompt; the model goes on from there.
    stop:         token texts a reply ends by; a trained one ends in the first of them.
    markers:      texts that must be one token each, the stops among them.
    reply_prefix: what the model writes before its answer's first character.
    gap:          stands between a reply's stop and what follows; never trained.
    trim:         white space around messages is removed.
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

    def spans(self, messages: Sequence[Message], train_on: TrainOn = "all_replies") -> list[Span]:
        spans: list[Span] = []
        seen = self.opening
        last = len(messages) - 1
        for i, (before, written) in enumerate(self._pieces(messages)):
            seen += before
            if written and (train_on == "all_replies" or i == last):
                spans += [Span(seen, False), Span(written, True)]
                seen = ""
            else:
                seen += written
        return [*spans, Span(seen + self.gap, False)]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self.opening + "".join(seen + written for seen, written in self._pieces(messages)) + self.reply

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def jinja(self) -> str:
        """The same format as a ``chat_template``, for tools that read one."""

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
    def read(cls, described: Mapping[str, Any]) -> Turns:
        """The format that ``describe`` recorded, JSON's lists made tuples again."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        return cls(**values)

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
        """(seen, written) for each message."""
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
                f"the {self.name} template has no system role, so the model would not know a system prompt as one",
                "leave the system prompt out, or train with --set data.system_role=merge, which writes it before the "
                "first user message",
            )
        return self.system
