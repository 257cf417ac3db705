"""Everything about a run that can be proven before a weight is read."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from luthier import rowcache, templates
from luthier.config import DataConfig, RunConfig
from luthier.control import ControlTokens
from luthier.data import DataReport, Loader, refuse
from luthier.encode import Encoder
from luthier.errors import ConfigError, UserError
from luthier.lora import Targets, resolve
from luthier.models.directory import eos_ids, family_of, read_config
from luthier.models.families import Family, Modules
from luthier.models.load import empty_model
from luthier.models.tokenizer import Tokenizer, load_tokenizer
from luthier.store import ExampleStore, NotKept, StoreWriter
from luthier.types import Conversation, Example, SystemRole, Template

Say = Callable[[str], None]
Rows = ExampleStore | StoreWriter
SAMPLES = 4  # training questions that a run without held-out rows is asked at its end


_PLAIN = Family("native", "native")


@dataclass(frozen=True, slots=True)
class Voice:
    """How a base model is spoken to: its tokenizer, the one template, and the ids a reply stops on."""

    config: PretrainedConfig
    tokenizer: Tokenizer
    template: Template
    stop_ids: tuple[int, ...]
    family: Family = _PLAIN

    def modules(self) -> Modules:
        """The checkpoint's own names of its linear modules, where they differ from the native ones."""
        return self.family.modules(self.config)

    def notes(self) -> Sequence[str]:
        """What is to be known about this checkpoint."""
        return self.family.notes(self.config)


def voice(
    path: Path,
    choice: str = "auto",
    described: dict[str, Any] | None = None,
    system_role: SystemRole = "template",
    rope_theta: float | None = None,
) -> Voice:
    """Read a model directory's configuration, tokenizer and template.

    choice, system_role: ``data.template``, ``data.system_role``. rope_theta: ``model.rope_theta``.
    described:           the template of an adapter, taken in their place.
    """
    config, family = read_config(path, rope_theta), family_of(path)
    tokenizer = load_tokenizer(path)
    ids = list(eos_ids(path, config))
    if tokenizer.hf.eos_token_id is not None:
        ids.append(int(tokenizer.hf.eos_token_id))
    texts = tuple(dict.fromkeys(t for i in ids if (t := tokenizer.text_of(i)) is not None))
    render = tokenizer.render if tokenizer.chat_template else None
    if described is None:
        template = templates.pick(choice, render, tokenizer.chat_template, texts, family.template, system_role)
    else:
        template = templates.from_description(described, render, tokenizer.chat_template, texts)
    stop = tuple(dict.fromkeys([*templates.stop_ids(template, tokenizer), *ids]))
    return Voice(config, tokenizer, template, stop, family)


def voice_of(config: RunConfig) -> Voice:
    """The base of a run, as its settings ask for it."""
    data = config.data
    return voice(config.model.path, data.template, None, data.system_role, config.model.rope_theta)


@dataclass(slots=True)
class Inspection:
    """What ``check`` found. ``error`` is set when the run must not start; counts are complete either way.

    train, held_out: the encoded rows (lengths alone where nothing will be trained).
    chats:           the held-out conversations themselves.
    first:           the first few encoded rows, for showing.
    samples:         the first few training conversations.
    eval_report:     the account of ``data.eval``'s files, where there are any.
    """

    config: RunConfig
    report: DataReport = field(default_factory=DataReport)
    eval_report: DataReport | None = None
    voice: Voice | None = None
    targets: Targets | None = None
    train: ExampleStore = field(default_factory=ExampleStore)
    held_out: ExampleStore = field(default_factory=ExampleStore)
    chats: list[Conversation] = field(default_factory=list)
    first: list[Example] = field(default_factory=list)
    samples: list[Conversation] = field(default_factory=list)
    fingerprint: str = ""
    seconds: float = 0.0
    error: UserError | None = None

    def as_dict(self) -> dict[str, Any]:
        v = self.voice
        return {
            "ok": self.error is None,
            **self.report.as_dict(),
            "problems": self._problems(),
            "tokens": self.train.stats(),
            "held_out": {
                "rows": len(self.held_out),
                "tokens": self.held_out.stats(),
                "report": self.eval_report.as_dict() if self.eval_report else None,
            },
            "template": {"name": v.template.name, "stop": list(v.template.stop)} if v else None,
            "stop_ids": list(v.stop_ids) if v else [],
            "target_modules": list(self.targets.leaves) if self.targets else [],
            "model_notes": self.model_notes(),
            "seconds": round(self.seconds, 3),
            "error": {"message": self.error.message, "fix": self.error.fix} if self.error else None,
        }

    def model_notes(self) -> list[str]:
        """What is to be known about the checkpoint, and which module names were read as others."""
        return [*(self.voice.notes() if self.voice else ()), *(self.targets.notes if self.targets else ())]

    def _problems(self) -> list[dict[str, Any]]:
        """Every row's problem; where the run is refused for another reason, that reason with no row."""
        rows = [p.as_dict() for p in self.report.problems]
        if self.error and not self.report.refused and self.report.kept:
            return [*rows, {"file": None, "row": None, "reason": self.error.message, "outcome": "refused"}]
        if self.error and not rows:
            file = str(self.config.data.train[0])
            return [{"file": file, "row": None, "reason": self.error.message, "outcome": "refused"}]
        return rows


def inspect(config: RunConfig, keep: bool = True, show: int = 0, say: Say = lambda _: None) -> Inspection:
    """Prove the run's contract: data, template, prompt prefix, stop tokens, target modules. Reads no weights.

    keep: hold the encoded rows, or take them from the disk as an earlier start proved them (``data.cache``); false
    needs memory for their lengths alone. show: how many rows to hold in ``first``. say: called with a note.
    The user's mistakes are collected in ``.error`` instead of raised, so that the counts are complete.
    """
    found = Inspection(config, train=ExampleStore(keep=keep), held_out=ExampleStore(keep=keep))
    start = time.perf_counter()
    errors: list[UserError] = []
    for stage in (_model, lambda f: _rows(f, keep, show, say)):
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


def _model(found: Inspection) -> None:
    config = found.config
    found.voice = voice_of(config)
    if config.data.system:
        check_text(found.voice, config.data.system, "data.system")
    found.targets = resolve(empty_model(found.voice.config), config.lora.target_modules, found.voice.modules())
    limit = getattr(found.voice.config.get_text_config(), "max_position_embeddings", None)
    if limit and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model reads",
            f"--set data.max_length={limit}",
        )


def check_text(v: Voice, text: str, what: str) -> None:
    """Raise DataError where a text for the model holds one of its control tokens."""
    control = ControlTokens.of([*v.tokenizer.control_tokens, *v.template.markers], "refuse")
    if control:
        control.check(text, what)


def _rows(found: Inspection, keep: bool, show: int, say: Say) -> None:
    """Every row, from the cache where it is to be used, or from the files."""
    if keep and not show and found.voice and found.config.data.cache:
        try:
            if _through_cache(found, found.voice, say):
                return
        except NotKept as e:
            say(f"note: the encoded rows are not kept on disk ({' '.join(str(e).split())[:200]})")
    account = rowcache.Account()
    try:
        _read(found, show, account, found.train, found.held_out)
    finally:
        _take(found, account)


def _through_cache(found: Inspection, v: Voice, say: Say) -> bool:
    """Open the rows that were kept, after reading and keeping them if need be. Raises NotKept.

    False where a data file cannot be opened: reading it will tell why.
    """
    at = rowcache.entry(
        found.config,
        tokenizer=v.tokenizer.digest(),
        template=templates.digest(v.template),
        stop_ids=v.stop_ids,
    )
    if at is None:
        return False
    kept = rowcache.load(at, say)
    if kept is None:
        with rowcache.writing(at) as (train, held_out, account):
            try:
                _read(found, 0, account, train, held_out)
            except UserError:
                _take(found, account)
                raise
        kept = rowcache.load(at, say)
        if kept is None:
            raise NotKept(f"{at.path} cannot be read back")
    account, found.train, found.held_out = kept
    _take(found, account)
    return True


def _take(found: Inspection, account: rowcache.Account) -> None:
    for name in rowcache.Account.__slots__:
        setattr(found, name, getattr(account, name))


def _read(found: Inspection, show: int, account: rowcache.Account, train: Rows, held_out: Rows) -> None:
    """Every row once, from file to ids; without a usable model, rows are counted all the same."""
    config = found.config.data
    if config.eval and config.eval_fraction:
        raise ConfigError(
            "data.eval_fraction would be ignored: data.eval names the held-out rows", "leave one of the two out"
        )
    loader = Loader(config.train, config.format, config.system, config.rename, config.dedupe)
    account.report = loader.report
    if found.voice is None:
        for _ in loader:
            pass
        return
    encoder = _encoder(found.voice, found.config)
    trained: set[bytes] = set()
    for conversation, example in encoder.stream(loader, loader.report):
        if len(found.first) < show:
            found.first.append(example)
        if config.eval_fraction and is_held_out(conversation, config.eval_fraction, found.config.train.seed):
            held_out.add(example)
            account.chats.append(conversation)
        else:
            train.add(example)
            if config.eval:
                trained.add(prompt_key(conversation))
            if len(account.samples) < SAMPLES:
                account.samples.append(conversation)
    account.fingerprint = loader.fingerprint()
    _rename_is_used(loader)
    refuse(loader.report)
    if not len(train):  # refuse() has seen to the case of no rows at all
        raise ConfigError(
            f"data.eval_fraction {config.eval_fraction}: holds out every row", "choose a smaller fraction"
        )
    if config.eval_fraction and not len(held_out):
        loader.report.notes[f"data.eval_fraction {config.eval_fraction} held out no row of {len(train)}"] += 1
    if config.eval:
        _read_held_out(config, encoder, trained, account, held_out)


def _read_held_out(
    config: DataConfig, encoder: Encoder, trained: set[bytes], account: rowcache.Account, held_out: Rows
) -> None:
    """``data.eval``'s rows. A prompt that is trained too is noted: what is learnt by heart says little."""
    held = Loader(config.eval, config.format, config.system, config.rename)
    account.eval_report = held.report
    leaks = 0
    for conversation, example in encoder.stream(held, held.report):
        held_out.add(example)
        account.chats.append(conversation)
        leaks += prompt_key(conversation) in trained
    account.fingerprint += held.fingerprint()
    refuse(held.report)
    if leaks:
        account.report.notes["the prompt of a row in data.eval is trained too"] = leaks


def _rename_is_used(loader: Loader) -> None:
    if loader.unused and loader.report.read:
        names = ", ".join(map(repr, sorted(loader.unused)))
        raise ConfigError(
            f"data.rename would be ignored: no row has the key {names}", "correct --rename OLD=NEW, or leave it out"
        )


def _encoder(v: Voice, config: RunConfig) -> Encoder:
    data = config.data
    control = ControlTokens.of([*v.tokenizer.control_tokens, *v.template.markers], data.control_tokens)
    return Encoder(v.template, v.tokenizer, v.stop_ids, data.max_length, data.too_long, data.train_on, control)


def is_held_out(conversation: Conversation, fraction: float, seed: int) -> bool:
    """Whether a row is for evaluation: by a hash of its prompt, so that equal prompts are on one side, always.

    A conversation's prompt is what comes before its first reply: one that goes on where another ends is on its side.
    """
    return int.from_bytes(prompt_key(conversation, seed), "little") < fraction * 2**64


def prompt_key(conversation: Conversation, seed: int = 0) -> bytes:
    """A hash of 8 bytes over what comes before the first reply."""
    key = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    for m in itertools.takewhile(lambda m: m.role != "assistant", conversation.messages):
        key.update(f"{m.role}\0{m.content.strip()}\0".encode())
    return key.digest()


def read_held_out(v: Voice, config: RunConfig, paths: Sequence[Path]) -> Inspection:
    """Rows for evaluation alone, read and encoded as the run's own were. Raises UserError."""
    found = Inspection(config, voice=v)
    loader = Loader(paths, config.data.format, config.data.system, config.data.rename)
    found.report = loader.report
    for conversation, example in _encoder(v, config).stream(loader, found.report):
        found.held_out.add(example)
        found.chats.append(conversation)
    refuse(found.report)
    return found
