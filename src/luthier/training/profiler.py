"""Profile the first steps of a run with ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from luthier.training.metrics import StepRecord
from luthier.types import Log

STEPS = 3  # recorded, after one warm-up step
OnStep = Callable[[StepRecord], None]


@contextmanager
def traced(to: Path, on_step: OnStep, log: Log) -> Iterator[OnStep]:
    """Write a trace in Chrome's format to ``to`` after step 4, or at the end of a shorter run.

    Yields the function to call after every step. Writes nothing if fewer than two steps are taken. If the trace cannot
    be written, ``log`` is called with a warning and the run continues.
    """
    steps = 0

    def write(profile: profiler.profile) -> None:
        if steps < 2:
            return
        temp = to.with_name(f".{to.name}.new")
        try:
            profile.export_chrome_trace(str(temp))
            temp.replace(to)
        except (OSError, RuntimeError) as e:
            temp.unlink(missing_ok=True)
            log(f"note: {to} could not be written ({' '.join(str(e).split())[:200]})")

    when = profiler.schedule(wait=0, warmup=1, active=STEPS, repeat=1)
    with profiler.profile(schedule=when, on_trace_ready=write) as running:

        def step(record: StepRecord) -> None:
            nonlocal steps
            on_step(record)
            steps += 1
            running.step()

        yield step
