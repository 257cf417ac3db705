"""Define ChatML: ``<|im_start|>role\\ncontent<|im_end|>\\n``, with the default system prompt that a model may have.

Source: the format's publication (OpenAI, 2023) and the templates of Yi, Qwen2 and SmolLM2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.templates.own import require_plain
from luthier.types import Message, Span, Tools

START, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class ChatML:
    """The ChatML template.

    default_system: what the model's own template adds to conversations without a system message; None for nothing.
    """

    default_system: str | None = None
    name: str = "chatml"
    stop: tuple[str, ...] = (END,)
    markers: tuple[str, ...] = (START, END)
    reply_prefix: str = ""

    def spans(self, messages: Sequence[Message], tools: Tools = ()) -> list[Span]:
        require_plain(messages, tools, self.name)
        spans: list[Span] = []
        pending = self._opening(messages)  # text to be read, up to the next written span
        for m in messages:
            if m.role == "assistant" and m.trained:
                spans += [Span(f"{pending}{START}assistant\n", False), Span(m.content + END, True)]
                pending = "\n"
            else:
                pending += f"{START}{m.role}\n{m.content}{END}\n"
        return [*spans, Span(pending, False)]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        require_plain(messages, tools, self.name)
        turns = "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages)
        return f"{self._opening(messages)}{turns}{START}assistant\n"

    def describe(self) -> dict[str, str | None]:
        return {"name": self.name, "default_system": self.default_system}

    def jinja(self) -> str:
        """Return the same format as a jinja ``chat_template``, for other tools."""
        default = ""
        if self.default_system is not None:
            text = json.dumps(f"{START}system\n{self.default_system}{END}\n", ensure_ascii=False)
            default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{% endif %}}"
        return (
            f"{default}{{% for m in messages %}}"
            f"{{{{ '{START}' + m['role'] + '\n' + m['content'] + '{END}\n' }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\n' }}}}{{% endif %}}"
        )

    def _opening(self, messages: Sequence[Message]) -> str:
        if self.default_system is None or messages[0].role == "system":
            return ""
        return f"{START}system\n{self.default_system}{END}\n"
