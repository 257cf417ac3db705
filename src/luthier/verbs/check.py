"""``luthier check``: check everything about a run that can be checked without reading weights.

``train``, ``estimate`` and ``demo`` start with the same inspection.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from luthier._util import files
from luthier.adapters.run_dir import RunDir, absolute
from luthier.config import RunConfig
from luthier.devices.device import pick_device
from luthier.encoding import row_cache
from luthier.encoding.rows import EncodedRows, count_rows, encode_rows
from luthier.encoding.store import CacheWriteError
from luthier.errors import ConfigError, UserError
from luthier.kernels import attention
from luthier.lora.layers import Targets, resolve
from luthier.models.chat_format import ChatFormat, chat_format_of
from luthier.models.directory import Fingerprint, context_length, fingerprint
from luthier.models.loader import check_base, training_dtype
from luthier.models.native_model import empty_model
from luthier.training import checkpoint, resources
from luthier.training.checkpoint import Checkpoint
from luthier.training.optimizer import check_packages
from luthier.training.resources import Estimate, Requirements
from luthier.types import Log


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training needs besides the weights."""

    config: RunConfig
    rows: EncodedRows
    chat_format: ChatFormat
    targets: Targets

    def base(self) -> Fingerprint:
        """Return the fingerprint of the base model."""
        return fingerprint(self.config.model.path, self.chat_format.config)

    def identity(self, base: Fingerprint) -> dict[str, str]:
        """Return digests of the rows and of the base model, which must not change before a run resumes."""
        return {"data": self.rows.report.fingerprint, "base model": base.weights}

    def requirements(self) -> Requirements:
        """Return what an estimate of memory and time needs."""
        return Requirements.of(self.config, self.chat_format.config, self.targets, self.rows.train)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of checking a run; the counts are complete even if the run cannot start.

    chat_format, targets: None if the model cannot be used. error: all mistakes, None if the run can start.
    expected: memory and time, estimated by ``check`` if nothing else was wrong.
    """

    config: RunConfig
    rows: EncodedRows
    chat_format: ChatFormat | None
    targets: Targets | None
    seconds: float
    error: UserError | None = None
    expected: Estimate | None = None

    def prepared(self) -> Prepared:
        """Return what training needs. Raises UserError with every mistake."""
        if self.error:
            raise self.error
        assert self.chat_format and self.targets
        return Prepared(self.config, self.rows, self.chat_format, self.targets)

    def as_dict(self) -> dict[str, object]:
        """The report of ``check --json`` and of ``data-report.json``."""
        rows, report, fmt = self.rows, self.rows.report, self.chat_format
        return {
            "ok": self.error is None,
            **report.data_report.as_dict(),
            "problems": self._problems(),
            "tokens": rows.train.stats(),
            "held_out": {
                "rows": len(rows.held_out),
                "tokens": rows.held_out.stats(),
                "report": report.eval_report.as_dict() if report.eval_report else None,
            },
            "template": {"name": fmt.template.name, "stop": list(fmt.template.stop)} if fmt else None,
            "stop_ids": list(fmt.stop_ids) if fmt else [],
            "target_modules": list(self.targets.leaves) if self.targets else [],
            "model_notes": self.model_notes(),
            **({"estimate": self.expected.as_dict()} if self.expected else {}),
            "seconds": round(self.seconds, 3),
            "error": {"message": self.error.message, "fix": self.error.fix} if self.error else None,
        }

    def model_notes(self) -> list[str]:
        """Warnings about this checkpoint, and module names that were translated to others."""
        return [*(self.chat_format.notes() if self.chat_format else ()), *(self.targets.notes if self.targets else ())]

    def _problems(self) -> list[dict[str, object]]:
        """List the problems of rows; if the run is refused for another reason, that reason without a row."""
        data_report = self.rows.report.data_report
        problems: list[dict[str, object]] = [p.as_dict() for p in data_report.problems]
        if self.error and not data_report.refused and data_report.kept:
            return [*problems, {"file": None, "row": None, "reason": self.error.message, "outcome": "refused"}]
        if self.error and not problems:
            file = str(self.config.data.train[0])
            return [{"file": file, "row": None, "reason": self.error.message, "outcome": "refused"}]
        return problems


def check(config: RunConfig, show: int = 0) -> Inspection:
    """Check rows, settings, the model's files and memory, as ``train`` does before it loads the weights.

    Does not raise for a user's mistake: it is in ``error`` of the result, next to the complete counts.
    """
    inspection = inspect(config, keep=False, show=show)
    if inspection.error:
        return inspection
    start, run, expected = time.perf_counter(), inspection.prepared(), None
    try:
        if config.output_dir:
            run_dir = RunDir(config.output_dir)
            run_dir.claim(absolute(config))
            resumable(run_dir, run.identity(run.base()), lambda _: None)
            if run_dir.finished:
                return inspection
        require_startable(run)
        expected = resources.estimate_run(run.requirements(), every_precision=False)
        resources.require_memory(expected)
    except UserError as e:
        inspection = replace(inspection, error=e)
    return replace(inspection, expected=expected, seconds=inspection.seconds + time.perf_counter() - start)


def resumable(run_dir: RunDir, identity: Mapping[str, str], log: Log) -> Checkpoint | None:
    """Return the checkpoint that an unfinished run resumes from, if there is one.

    identity: as returned by ``Prepared.identity``. Raises ConfigError if the run began with other rows or another base.
    """
    if run_dir.finished:
        run_dir.same_identity(run_dir.summary().get("identity", {}), identity)
        return None
    resume = checkpoint.latest(run_dir.checkpoints, log)
    if resume:
        run_dir.same_identity(resume.identity, identity)
    return resume


def require_startable(run: Prepared) -> None:
    """Raise UserError if this machine or the files of the model do not allow the run; reads no weights."""
    settings, device = run.config.model, pick_device()
    attention.check(settings.attn_implementation, device, training_dtype(settings, device))
    check_packages(run.config.train.optim, device.type)
    check_base(settings, run.chat_format.config)


def inspect(config: RunConfig, keep: bool = True, show: int = 0, log: Log = lambda _: None) -> Inspection:
    """Check a run as ``check`` does, and keep the encoded rows for training.

    keep: keep the encoded rows, from the row cache if ``data.cache`` allows; false keeps only their lengths.
    show: number of rows to keep in ``rows.report.first``.
    """
    start = time.perf_counter()
    errors: list[UserError] = []
    chat_format, targets = None, None
    try:
        chat_format = chat_format_of(config)
        targets = _targets(config, chat_format)
    except UserError as e:
        errors.append(e)
    rows = _rows(config, chat_format, keep, show, log)
    if rows.report.error:
        errors.append(rows.report.error)
    error = _joined(errors) if errors else None
    return Inspection(config, rows, chat_format, targets, time.perf_counter() - start, error)


def _targets(config: RunConfig, chat_format: ChatFormat) -> Targets:
    """Resolve the modules to train. Raises UserError for settings that do not fit the model."""
    if config.data.system:
        chat_format.check_text(config.data.system, "data.system")
    targets = resolve(empty_model(chat_format.config), config.lora.target_modules, chat_format.modules())
    limit = context_length(chat_format.config)
    if limit and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model can read",
            f"--set data.max_length={limit}",
        )
    return targets


def _rows(config: RunConfig, chat_format: ChatFormat | None, keep: bool, show: int, log: Log) -> EncodedRows:
    """Read every row from the cache if it may be used, else from the data files."""
    if chat_format is None:
        return count_rows(config.data)
    encoder = chat_format.encoder(config.data)
    if keep and not show and config.data.cache:
        try:
            if rows := row_cache.cached_rows(config, encoder, log):
                return rows
        except CacheWriteError as e:
            if files.can_cache(log):
                log(f"note: the encoded rows are not kept on disk ({' '.join(str(e).split())[:200]})")
    return encode_rows(config.data, config.train.seed, encoder, keep, show)


def _joined(errors: list[UserError]) -> UserError:
    """Join all mistakes in one error, of the type of the first."""
    if len(errors) == 1:
        return errors[0]
    fixes = dict.fromkeys(e.fix for e in errors)
    return type(errors[0])("\n".join(e.message for e in errors), "; ".join(fixes))
