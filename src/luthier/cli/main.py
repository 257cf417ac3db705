"""The command line ``luthier``: its commands, and exit codes for errors.

0: done. 2: the user must act (prints one message and what to type). 1: a bug in luthier (prints a traceback).
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import typer

from luthier import __version__
from luthier._util.environment import KEEP_FREED_MEMORY
from luthier._util.files import user_error_of
from luthier.cli import chat, check, demo, doctor, estimate, export, init, merge, pull, serve, train
from luthier.cli import eval as evaluate
from luthier.cli.common import fail
from luthier.errors import UserError

app = typer.Typer(
    name="luthier",
    help="Fine-tune chat models with LoRA and QLoRA on the machine you have, and chat with the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    keep_freed_memory: bool = typer.Option(
        True,
        envvar=KEEP_FREED_MEMORY,
        help="Keep freed memory in the process (mallopt of glibc): training is faster.",
    ),
) -> None:
    os.environ[KEEP_FREED_MEMORY] = "1" if keep_freed_memory else "0"
    if version:
        print(f"luthier {__version__}")
        raise typer.Exit


app.command("demo", short_help="Train a small model and chat with it, in minutes.")(demo.run)
app.command("pull", short_help="Download a model and verify its files.")(pull.run)
app.command("init", short_help="Write a run.yaml with every setting explained.")(init.run)
app.command("check", short_help="Check data, template and targets without training.")(check.run)
app.command("estimate", short_help="Estimate memory and time of a run.")(estimate.run)
app.command("train", short_help="Train an adapter.")(train.run)
app.command("eval", short_help="Compare base and tuned model on held-out rows.")(evaluate.run)
app.command("chat", short_help="Chat with a run, an adapter or a base model.")(chat.run)
app.command("merge", short_help="Merge an adapter into its base model.")(merge.run)
app.command("export", short_help="Export a run in another tool's format.")(export.run)
app.command("serve", short_help="Serve runs over an OpenAI-compatible API.")(serve.run)
app.command("doctor", short_help="Show what this machine supports and test it.")(doctor.run)


def main() -> None:
    """Run the ``luthier`` command."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - no home: as in containers, for libraries that need one
        os.environ["HOME"] = "/"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters the console lacks
    try:
        app()
    except UserError as e:
        fail(e)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as e:
        if "No usable temporary directory" in str(e):
            fail(UserError("no directory for temporary files can be written", "set TMPDIR to one that can be written"))
        elif e.filename is None:
            raise
        else:
            fail(user_error_of(Path(os.fsdecode(e.filename)), e))
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        fail(
            UserError(
                "there is not enough memory",
                "use a smaller model; in training, also: --set train.micro_batch_tokens=0 "
                "--set train.per_device_train_batch_size=1 --set train.gradient_checkpointing=true "
                "--set model.load_in_4bit=true",
            )
        )
        sys.exit(2)


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means lack of memory; torch raises a plain RuntimeError on the CPU, recognised by its text."""
    names = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in names or "can't allocate memory" in str(error)


if __name__ == "__main__":
    main()
