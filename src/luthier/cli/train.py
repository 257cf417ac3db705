"""``luthier train``"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from luthier.cli.common import (
    Data,
    File,
    Model,
    OutputDir,
    Recipe,
    Rename,
    Set,
    config,
    importing,
    say,
    step_progress,
    stopping,
)


def run(
    file: File = None,
    model: Model = None,
    data: Data = None,
    output_dir: OutputDir = None,
    settings: Set = None,
    rename: Rename = None,
    recipe: Recipe = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start also where memory will not do, by the estimate.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write RUN/trace.json: where the time of steps 2 to 4 goes.")
    ] = False,
) -> None:
    """Train an adapter: check everything first, then learn, then write RUN/adapter."""
    wanted = config(model, data, output_dir, settings, rename, file, recipe)
    with importing():
        from luthier.training.profiler import traced
        from luthier.verbs.train import Stopped, train

    try:
        with ExitStack() as stack:
            stop, on_step = stack.enter_context(stopping()), stack.enter_context(step_progress())
            if profile and wanted.output_dir:
                on_step = stack.enter_context(traced(wanted.output_dir / "trace.json", on_step, say))
            summary = train(wanted, on_step, say, stop, force)
    except Stopped as e:
        say(f"{e}\n  to go on: run the same command again")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        say("stopped at once; what was saved before is kept\n  to go on: run the same command again")
        raise typer.Exit(130) from None
    losses = summary["losses"]
    print(
        f"{summary['steps']} steps in {summary['train_seconds']:.1f} s "
        f"({summary['tokens_per_s']:.0f} tokens/s, peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB); "
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"report:     {wanted.output_dir}/report.html")
    if profile and (wanted.output_dir / "trace.json").is_file():
        print(f"trace:      {wanted.output_dir}/trace.json (open it at chrome://tracing)")
    print(f"talk to it: luthier chat {wanted.output_dir}")
