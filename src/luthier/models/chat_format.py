"""Combine a base model's tokenizer, chat template and stop tokens into one chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from luthier.config import DataConfig, RunConfig
from luthier.encoding.control import ControlTokens, check_text
from luthier.encoding.encoder import OUTSIDE_FIX, Encoder, outside_table
from luthier.errors import DataError, TemplateError
from luthier.models.directory import eos_ids, family_of, read_config
from luthier.models.families import Family, Modules
from luthier.models.tokenizer.chat_template import differences
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.templates import Jinja, RefusedConversation, SystemAsUser, from_description, pick
from luthier.templates import stop_ids as template_stop_ids
from luthier.templates.own import written_stop
from luthier.types import Message, SystemRole, Template, Tools

_PLAIN = Family("native", "native")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The chat format of a base model, the same in training, chat, evaluation, serving and export.

    stop_ids: every token id that ends a reply; the template's own first.
    remarks:  what the user should know of templates and stop tokens.
    """

    config: PretrainedConfig
    tokenizer: Tokenizer
    template: Template
    stop_ids: tuple[int, ...]
    family: Family = _PLAIN
    remarks: tuple[str, ...] = ()

    def prompt_text(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Render the prompt of a conversation. Raises TemplateError if the template refuses it."""
        try:
            return self.template.prompt(messages, tools)
        except RefusedConversation as e:
            raise TemplateError(
                f"the model's chat template refuses this conversation: {e}",
                "leave the system prompt out, or train with --set data.system_role=merge",
            ) from None

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Encode the prompt of a conversation; no other function does this. Raises TemplateError or DataError."""
        ids = list(self.tokenizer.encode_batch([self.prompt_text(messages, tools)])[0].ids)
        if outside := outside_table(ids, self.tokenizer, _table(self.config)):
            raise DataError(f"the prompt contains {outside}", OUTSIDE_FIX)
        return ids

    def check_text(self, text: str, what: str) -> None:
        """Raise DataError if a text is not valid text or contains one of the model's control tokens."""
        check_text(text, what, self.tokenizer, self.template)

    def encoder(self, data: DataConfig) -> Encoder:
        """Build the encoder from conversations to token ids and loss masks, with the run's data settings."""
        template, tokenizer = self.template, self.tokenizer
        control = ControlTokens.of([*tokenizer.control_tokens, *template.markers], data.control_tokens)
        return Encoder(
            template=template,
            tokenizer=tokenizer,
            stop_ids=self.stop_ids,
            max_length=data.max_length,
            too_long=data.too_long,
            train_on=data.train_on,
            thinking=data.thinking,
            control=control,
            table=_table(self.config),
        )

    def modules(self) -> Modules:
        """Map the checkpoint's own names of linear modules to native ones; empty if they are the same."""
        return self.family.modules(self.config)

    def notes(self) -> Sequence[str]:
        """Return notes for the user of this checkpoint."""
        return (*self.remarks, *self.family.notes(self.config))


def load_chat_format(
    path: Path,
    choice: str = "auto",
    described: Mapping[str, object] | None = None,
    system_role: SystemRole = "template",
    rope_theta: float | None = None,
    own_template: str | None = None,
) -> ChatFormat:
    """Load the chat format of a model directory: configuration, tokenizer and template. Raises UserError.

    choice, system_role: ``data.template``, ``data.system_role``. rope_theta: ``model.rope_theta``.
    described:           the template that an adapter was trained with; it overrides ``choice``.
    own_template:        a jinja template to use as the model's own, in place of the directory's.
    """
    config, family = read_config(path, rope_theta), family_of(path)
    tokenizer = load_tokenizer(path)
    if own_template is not None:
        tokenizer.hf.chat_template = own_template
    ids = list(eos_ids(path, config))
    if tokenizer.hf.eos_token_id is not None:
        ids.append(int(tokenizer.hf.eos_token_id))
    rows = _table(config)
    ids = [i for i in ids if rows is None or i < rows]  # the model can write no others
    texts = tuple(dict.fromkeys(t for i in ids if (t := tokenizer.text_of(i)) is not None))
    own = tokenizer.own_template
    if own and (written := written_stop(own, tokenizer.control_tokens, texts)):
        texts = (written, *texts)
    if described is None:
        template = pick(choice, own, texts, family.template, system_role)
    else:
        template = from_description(described, own, texts)
    stop = tuple(dict.fromkeys([*template_stop_ids(template, tokenizer), *ids]))
    _check_template(template, tokenizer, rows)
    remarks = [note] if own_template is None and (note := differences(path)) else []
    if unlisted := [text for text in template.stop if tokenizer.token_id(text) not in ids]:
        remarks.append(
            f"{', '.join(unlisted)} ends a reply in the chat template, but the model's configuration does not list it "
            "as a stop token: it is one here, and in everything that is exported"
        )
    inner = template.inner if isinstance(template, SystemAsUser) else template
    if isinstance(inner, Jinja) and (added := inner.added_stop):
        remarks.append(f"the chat template writes nothing after the last reply; a trained reply ends with {added}")
    return ChatFormat(config, tokenizer, template, stop, family, tuple(remarks))


def chat_format_of(config: RunConfig) -> ChatFormat:
    """Load the chat format of a run's base model, with the run's settings. Raises UserError."""
    data = config.data
    return load_chat_format(config.model.path, data.template, None, data.system_role, config.model.rope_theta)


def _table(config: PretrainedConfig) -> int | None:
    """Return how many rows the model's embedding table has."""
    rows: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return rows


def _check_template(template: Template, tokenizer: Tokenizer, rows: int | None) -> None:
    """Raise TemplateError if the template writes a token that the embedding table has no row for."""
    texts = [*template.stop, *template.markers]
    question, answer = Message("user", "a"), Message("assistant", "b")
    with suppress(RefusedConversation):  # by templates that require a system prompt, for example
        texts.append(tokenizer.render((question, answer), False) if template.name == "jinja" else "")
        texts.append(template.prompt((question,)))
    for encoding in tokenizer.encode_batch(texts):
        if outside := outside_table(encoding.ids, tokenizer, rows):
            raise TemplateError(
                f"the template {template.name} contains {outside}",
                "choose another template: --set data.template=..., or use the checkpoint that the tokenizer belongs to",
            )
