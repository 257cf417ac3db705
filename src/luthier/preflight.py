"""Everything about a run that can be proven before a weight is read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from luthier import data, templates
from luthier.config import RunConfig
from luthier.data.report import DataReport, Dataset
from luthier.encode import Encoder, length_stats
from luthier.errors import ConfigError, UserError
from luthier.lora import Targets, resolve
from luthier.models.directory import eos_ids, read_config
from luthier.models.load import empty_model
from luthier.models.tokenizer import Tokenizer, load_tokenizer
from luthier.types import Example, Template


@dataclass(frozen=True, slots=True)
class Voice:
    """How a base model is spoken to: its tokenizer, the one template, and the ids a reply stops on."""

    config: PretrainedConfig
    tokenizer: Tokenizer
    template: Template
    stop_ids: tuple[int, ...]


def voice(path: Path, choice: Any = "auto", described: dict[str, Any] | None = None) -> Voice:
    """Read a model directory's configuration, tokenizer and template.

    choice: ``data.template``. described: the template of an adapter, taken in its place.
    """
    config = read_config(path)
    tokenizer = load_tokenizer(path)
    ids = list(eos_ids(path, config))
    if tokenizer.hf.eos_token_id is not None:
        ids.append(int(tokenizer.hf.eos_token_id))
    texts = tuple(dict.fromkeys(t for i in ids if (t := tokenizer.text_of(i)) is not None))
    render = tokenizer.render if tokenizer.chat_template else None
    if described is None:
        template = templates.pick(choice, render, tokenizer.chat_template, texts)
    else:
        template = templates.from_description(described, render, texts)
    return Voice(config, tokenizer, template, tuple(dict.fromkeys([*templates.stop_ids(template, tokenizer), *ids])))


@dataclass(slots=True)
class Inspection:
    """What ``check`` found. ``error`` is set when the run must not start; counts are complete either way."""

    config: RunConfig
    report: DataReport = field(default_factory=DataReport)
    dataset: Dataset | None = None
    voice: Voice | None = None
    targets: Targets | None = None
    examples: list[Example] = field(default_factory=list)
    seconds: float = 0.0
    error: UserError | None = None

    def as_dict(self) -> dict[str, Any]:
        v = self.voice
        return {
            "ok": self.error is None,
            **self.report.as_dict(),
            "problems": self._problems(),
            "tokens": length_stats(self.examples),
            "template": {"name": v.template.name, "stop": list(v.template.stop)} if v else None,
            "stop_ids": list(v.stop_ids) if v else [],
            "target_modules": list(self.targets.leaves) if self.targets else [],
            "seconds": round(self.seconds, 3),
            "error": {"message": self.error.message, "fix": self.error.fix} if self.error else None,
        }

    def _problems(self) -> list[dict[str, Any]]:
        """Every row's problem; where the run is refused for another reason, that reason with no row."""
        rows = [p.as_dict() for p in self.report.problems]
        if self.error and not self.report.refused and self.report.kept:
            return [*rows, {"file": None, "row": None, "reason": self.error.message, "outcome": "refused"}]
        if self.error and not rows:
            file = str(self.config.data.train[0])
            return [{"file": file, "row": None, "reason": self.error.message, "outcome": "refused"}]
        return rows


def inspect(config: RunConfig) -> Inspection:
    """Prove the run's contract: data, template, prompt prefix, stop tokens, target modules. Reads no weights.

    The user's mistakes are collected in ``.error`` instead of raised, so that the counts are complete.
    """
    found = Inspection(config)
    start = time.perf_counter()
    errors: list[UserError] = []
    for stage in (_read, _model, _encode):
        try:
            stage(found)
        except UserError as e:
            errors.append(e)
    if errors:
        found.error = errors[0]
        if len(errors) > 1:
            kind = type(errors[0])
            fixes = dict.fromkeys(e.fix for e in errors)
            found.error = kind("\n".join(e.message for e in errors), "; ".join(fixes))
    found.seconds = time.perf_counter() - start
    return found


def _read(found: Inspection) -> None:
    config = found.config.data
    found.dataset = data.load(config.train, config.format, config.system)
    found.report = found.dataset.report


def _model(found: Inspection) -> None:
    config = found.config
    found.voice = voice(config.model.path, config.data.template)
    found.targets = resolve(empty_model(found.voice.config), config.lora.target_modules)
    limit = getattr(found.voice.config.get_text_config(), "max_position_embeddings", None)
    if limit and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model reads",
            f"--set data.max_length={limit}",
        )


def _encode(found: Inspection) -> None:
    if found.voice is None or found.dataset is None:
        return
    config, v = found.config.data, found.voice
    encoder = Encoder(v.template, v.tokenizer, v.stop_ids, config.max_length, config.too_long, config.train_on)
    found.examples = encoder.encode(found.dataset.conversations, found.report)
    data.refuse(found.report)
