"""``--to ollama``: a Modelfile next to the GGUF, with template, stop tokens, system prompt and sampling.

Ollama does not run the chat template inside the GGUF file. Its own templates are written in Go's ``text/template``, so
ours are translated to that. Source: Ollama's Modelfile reference and template documentation.
"""

from __future__ import annotations

from luthier.config import GenerationSettings
from luthier.errors import TemplateError
from luthier.templates import ChatML, SystemAsUser, Turns
from luthier.templates.chatml import END, START
from luthier.types import Template

_INSTEAD = "use --to gguf, whose template llama.cpp runs"


def modelfile(file: str, template: Template, system: str | None, settings: GenerationSettings | None) -> str:
    """Build the text of a Modelfile. Raises TemplateError if Ollama's language cannot express it."""
    if '"""' in (system or ""):
        raise TemplateError('the system prompt contains """, which ends it in a Modelfile', _INSTEAD)
    lines = [f"FROM ./{file}", f'TEMPLATE """{go_template(template)}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{text}"' for text in template.stop]
    if settings:
        lines.append(f"PARAMETER temperature {settings.temperature if settings.do_sample else 0}")
        lines += (
            [f"PARAMETER top_p {settings.top_p}", f"PARAMETER top_k {settings.top_k}"] if settings.do_sample else []
        )
        lines.append(f"PARAMETER repeat_penalty {settings.repetition_penalty}")
        lines.append(f"PARAMETER num_predict {settings.max_new_tokens}")
    return "\n".join(lines) + "\n"


def notes(settings: GenerationSettings | None) -> list[str]:
    """Name the sampling settings of a run that Ollama does not have."""
    if settings is None or not settings.no_repeat_ngram_size:
        return []
    return [
        "Ollama has no setting for generation.no_repeat_ngram_size, so its replies may repeat "
        "text that luthier would not"
    ]


def go_template(template: Template) -> str:
    """Translate ``template`` to Ollama's language, for conversations of any length. Raises TemplateError."""
    inner = template.inner if isinstance(template, SystemAsUser) else template
    if isinstance(inner, ChatML):
        default = f"{START}system\n{inner.default_system}{END}\n" if inner.default_system is not None else ""
        turns = f"{{{{ range .Messages }}}}{START}{{{{ .Role }}}}\n{{{{ .Content }}}}{END}\n{{{{ end }}}}"
        return f"{_unless_system(default)}{turns}{START}assistant\n"
    if not isinstance(inner, Turns):
        raise TemplateError("the model's own chat template cannot be translated to Ollama's language", _INSTEAD)
    system, system_as_user = "", ""
    if isinstance(template, SystemAsUser):  # held back until the first user's message
        system, system_as_user = (
            "{{ $system = .Content }}",
            '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}',
        )
    elif inner.system:
        system = f"{inner.system[0]}{{{{ .Content }}}}{inner.system[1]}"
    before, after = inner.user
    follows = inner.gap + before.removeprefix(inner.stop[0])
    opened = before if follows == before else f"{{{{ if $replied }}}}{follows}{{{{ else }}}}{before}{{{{ end }}}}"
    return (
        f'{inner.opening}{{{{ $replied := false }}}}{{{{ $system := "" }}}}{{{{ range .Messages }}}}'
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{opened}{system_as_user}{{{{ .Content }}}}{after}{{{{ $replied = false }}}}'
        f"{{{{ else }}}}{inner.reply}{inner.reply_prefix}{{{{ .Content }}}}{inner.stop[0]}{{{{ $replied = true }}}}"
        f"{{{{ end }}}}{{{{ end }}}}{inner.reply}"
    )


def _unless_system(text: str) -> str:
    """Write ``text`` only if the conversation has no system message (Ollama makes SYSTEM one of the messages)."""
    return f"{{{{ if not .System }}}}{text}{{{{ end }}}}" if text else ""
