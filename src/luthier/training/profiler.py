"""Where the time of a run's first steps goes, as ``torch.profiler`` sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from luthier.training.metrics import StepRecord

STEPS = 3  # traced, after one that warms up
OnStep = Callable[[StepRecord], None]


@contextmanager
def traced(to: Path, on_step: OnStep, say: Callable[[str], None]) -> Iterator[OnStep]:
    """Within the block ``to`` is written after step 4, or at the end of a shorter run, in Chrome's trace format.

    Gives the function to call at every step. Nothing is written where fewer than two steps are taken. A disk that does
    not take it costs the trace, not the run, and is said.
    """
    taken = 0

    def write(found: profiler.profile) -> None:
        if taken < 2:
            return
        temp = to.with_name(f".{to.name}.new")
        try:
            found.export_chrome_trace(str(temp))
            temp.replace(to)
        except (OSError, RuntimeError) as e:
            temp.unlink(missing_ok=True)
            say(f"note: {to} could not be written ({' '.join(str(e).split())[:200]})")

    when = profiler.schedule(wait=0, warmup=1, active=STEPS, repeat=1)
    with profiler.profile(schedule=when, on_trace_ready=write) as running:

        def step(record: StepRecord) -> None:
            nonlocal taken
            on_step(record)
            taken += 1
            running.step()

        yield step
