"""The options and output of ``luthier train``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from luthier.cli.common import (
    DataOption,
    FileArgument,
    ModelOption,
    OutputDirOption,
    RecipeOption,
    RenameOption,
    SetOption,
    config,
    importing,
    print_stderr,
    step_progress,
    stopping,
)


def run(
    file: FileArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    output_dir: OutputDirOption = None,
    settings: SetOption = None,
    rename: RenameOption = None,
    recipe: RecipeOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the estimate exceeds available memory.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write RUN/trace.json, a profile of steps 2 to 4.")
    ] = False,
) -> None:
    """Check the data and the settings, train an adapter, and write it to RUN/adapter."""
    run_config = config(model, data, output_dir, settings, rename, file, recipe, required=["output_dir"])
    with importing():
        from luthier.training.profiler import traced
        from luthier.verbs.train import Stopped, train

    try:
        with ExitStack() as stack:
            stop, on_step = stack.enter_context(stopping()), stack.enter_context(step_progress())
            if profile and run_config.output_dir:
                on_step = stack.enter_context(traced(run_config.output_dir / "trace.json", on_step, print_stderr))
            summary = train(run_config, on_step, print_stderr, stop, force)
    except Stopped as e:
        print_stderr(f"{e}\n  to resume: run the same command again")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        print_stderr("stopped at once; earlier checkpoints are kept\n  to resume: run the same command again")
        raise typer.Exit(130) from None
    losses, peak, folder = summary["losses"], summary["peak_rss_bytes"], run_config.output_dir
    assert folder is not None  # required
    print(
        f"{summary['steps']} steps in {summary['train_seconds']:.1f} s "
        f"({summary['tokens_per_s']:.0f} tokens/s, peak memory {peak / 1e9:.2f} GB); "
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"report:       {folder}/report.html")
    if profile and (folder / "trace.json").is_file():
        print(f"trace:        {folder}/trace.json (open it at chrome://tracing)")
    print(f"chat with it: luthier chat {folder}")
