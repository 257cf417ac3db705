"""Find the chat templates of a model directory, in transformers' order of precedence, and run one.

chat_template.jinja, additional_chat_templates/*.jinja    the default and others by name
tokenizer_config.json                                     a text, or a list of named ones; only without the above
chat_template.json                                        of processors; only without all of the above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from jinja2.exceptions import TemplateError as JinjaError

from luthier.errors import ModelError
from luthier.models.checkpoint_reader import read_json
from luthier.models.protocols import HfTokenizer
from luthier.templates import RefusedConversation
from luthier.templates.own import DATE
from luthier.types import Tools

TEMPLATE_FILE = "chat_template.jinja"
_DIRECTORY = "additional_chat_templates"
_CONFIG, _PROCESSOR = "tokenizer_config.json", "chat_template.json"


def read_templates(path: Path) -> dict[str, str]:
    """Return the chat templates of a directory by name; the usual one is called "default". Raises ModelError."""
    return next((templates for templates in _places(path).values() if templates), {})


def own_templates(path: Path) -> str | dict[str, str] | None:
    """Read a directory's chat templates as transformers holds them: one text, or several by name."""
    templates = read_templates(path)
    return templates.get("default") if templates.keys() <= {"default"} else templates


def differences(path: Path) -> str | None:
    """Describe that two places have different default templates, and which is used; None if they agree."""
    defaults = {place: t["default"].strip() for place, t in _places(path).items() if "default" in t}
    used, *others = defaults or [""]
    other = next((place for place in others if defaults[place] != defaults[used]), None)
    return f"{used} and {other} contain different chat templates; {used} is used" if other else None


def _places(path: Path) -> dict[str, dict[str, str]]:
    files = {"default": path / TEMPLATE_FILE} if (path / TEMPLATE_FILE).is_file() else {}
    files |= {file.stem: file for file in sorted((path / _DIRECTORY).glob("*.jinja"))}
    try:
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: a chat template cannot be read ({e})", "download the model again") from None
    return {
        TEMPLATE_FILE: texts,
        _CONFIG: _named(read_json(path / _CONFIG).get("chat_template")),
        _PROCESSOR: _named(read_json(path / _PROCESSOR).get("chat_template")),
    }


def _named(entry: object) -> dict[str, str]:
    """Return the templates of a configuration entry: a text, a list of named ones, or an object of them."""
    if isinstance(entry, list):
        entry = {str(t.get("name")): t.get("template") for t in entry if isinstance(t, dict)}
    templates = entry if isinstance(entry, dict) else {"default": entry}
    return {str(name): text for name, text in templates.items() if isinstance(text, str)}


def render(
    hf: HfTokenizer, source: str, rows: Sequence[Mapping[str, object]], add_generation_prompt: bool, tools: Tools = ()
) -> str:
    """Run the chat template ``source``. Raises RefusedConversation if it raises an error."""
    try:
        text = hf.apply_chat_template(
            rows,
            tools=[dict(tool) for tool in tools] or None,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=f"{DATE:%d %b %Y}",
        )
    except JinjaError as e:
        raise RefusedConversation(" ".join(str(e).split())) from None
    except Exception as e:  # of Python, within the template
        raise RefusedConversation(f"{type(e).__name__}: {' '.join(str(e).split())}") from None
    assert isinstance(text, str)
    return text


def reads_only_parts(hf: HfTokenizer, source: str) -> bool:
    """Whether a template reads the content of a message as a list of parts only, as those of models with images do."""
    for content, reads in (("probe_text", False), ([{"type": "text", "text": "probe_text"}], True)):
        with suppress(RefusedConversation):
            if "probe_text" in render(hf, source, [{"role": "user", "content": content}], True):
                return reads
    return False
