"""``luthier estimate``: predict memory and time of a run before it starts."""

from __future__ import annotations

from dataclasses import replace

from luthier.config import RunConfig
from luthier.errors import ConfigError, UserError
from luthier.lora.layers import resolve
from luthier.models.directory import family_of, read_config
from luthier.models.native_model import empty_model
from luthier.training import resources
from luthier.training.memory_model import RowLengths
from luthier.training.resources import Estimate, Requirements
from luthier.verbs.check import inspect, require_startable


def estimate(config: RunConfig, with_rows: bool = True, length: int | None = None) -> Estimate:
    """Estimate memory and time of a run at every precision, without reading weights. Raises UserError.

    with_rows: use the lengths of the rows of ``data.train``.
    length:    without rows, tokens per row; None: ``data.max_length``.
    """
    if with_rows and length is not None:
        raise ConfigError("--length would be ignored: --data gives the lengths of the rows", "leave it out")
    if with_rows:
        run = inspect(config, keep=False).prepared()
        expected = resources.estimate_run(run.requirements())
        try:
            require_startable(run)
        except UserError as e:
            refusal = f"luthier train refuses this run: {e.message}; {e.fix}"
            expected = replace(expected, notes=(*expected.notes, refusal))
        return expected
    settings = config.model
    native = read_config(settings.path, settings.rope_theta)
    targets = resolve(empty_model(native), config.lora.target_modules, family_of(settings.path).modules(native))
    rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    lengths = RowLengths.of_length(length or config.data.max_length, rows)
    return resources.estimate_run(Requirements(config, native, targets, lengths))
