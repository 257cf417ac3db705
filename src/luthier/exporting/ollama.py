"""``--to ollama``: a Modelfile beside the GGUF, with template, stops, system prompt and sampling.

Ollama does not run the template inside the file: it has a language of its own (Go's ``text/template``), in which the
same texts are written here. Source: Ollama's Modelfile reference and template documentation.
"""

from __future__ import annotations

from luthier.config import GenerationSettings
from luthier.errors import TemplateError
from luthier.templates import ChatML, MergedSystem, Turns
from luthier.templates.chatml import END, START
from luthier.types import Template

_INSTEAD = "use --to gguf, whose template llama.cpp runs"


def modelfile(file: str, template: Template, system: str | None, chosen: GenerationSettings | None) -> str:
    """The Modelfile's text. Raises TemplateError where Ollama's language cannot say it."""
    if '"""' in (system or ""):
        raise TemplateError('the system prompt holds """, which ends it in a Modelfile', _INSTEAD)
    lines = [f"FROM ./{file}", f'TEMPLATE """{go_template(template)}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{text}"' for text in template.stop]
    if chosen:
        lines.append(f"PARAMETER temperature {chosen.temperature if chosen.do_sample else 0}")
        lines += [f"PARAMETER top_p {chosen.top_p}", f"PARAMETER top_k {chosen.top_k}"] if chosen.do_sample else []
        lines.append(f"PARAMETER repeat_penalty {chosen.repetition_penalty}")
        lines.append(f"PARAMETER num_predict {chosen.max_new_tokens}")
    return "\n".join(lines) + "\n"


def notes(chosen: GenerationSettings | None) -> list[str]:
    """What of a run's sampling Ollama has no setting for."""
    if chosen is None or not chosen.no_repeat_ngram_size:
        return []
    return [
        "Ollama has no setting for generation.no_repeat_ngram_size, so its replies may repeat what luthier's do not"
    ]


def go_template(template: Template) -> str:
    """The prompts of ``template`` in Ollama's language, for a conversation of any length. Raises TemplateError."""
    inner = template.inner if isinstance(template, MergedSystem) else template
    if isinstance(inner, ChatML):
        default = f"{START}system\n{inner.default_system}{END}\n" if inner.default_system is not None else ""
        turns = f"{{{{ range .Messages }}}}{START}{{{{ .Role }}}}\n{{{{ .Content }}}}{END}\n{{{{ end }}}}"
        return f"{_unless_system(default)}{turns}{START}assistant\n"
    if not isinstance(inner, Turns):
        raise TemplateError("the model's own chat template cannot be said in Ollama's language", _INSTEAD)
    system, kept = "", ""
    if isinstance(template, MergedSystem):  # held back until the first user's message
        system, kept = "{{ $system = .Content }}", '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
    elif inner.system:
        system = f"{inner.system[0]}{{{{ .Content }}}}{inner.system[1]}"
    before, after = inner.user
    follows = inner.gap + before.removeprefix(inner.stop[0])
    opened = before if follows == before else f"{{{{ if $replied }}}}{follows}{{{{ else }}}}{before}{{{{ end }}}}"
    return (
        f'{inner.opening}{{{{ $replied := false }}}}{{{{ $system := "" }}}}{{{{ range .Messages }}}}'
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{opened}{kept}{{{{ .Content }}}}{after}{{{{ $replied = false }}}}'
        f"{{{{ else }}}}{inner.reply}{inner.reply_prefix}{{{{ .Content }}}}{inner.stop[0]}{{{{ $replied = true }}}}"
        f"{{{{ end }}}}{{{{ end }}}}{inner.reply}"
    )


def _unless_system(text: str) -> str:
    """``text`` where the conversation has no system message (Ollama puts SYSTEM among the messages)."""
    return f"{{{{ if not .System }}}}{text}{{{{ end }}}}" if text else ""
