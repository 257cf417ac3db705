"""The command line ``luthier``: its commands, and exit codes for errors.

0: done. 2: the user must act (prints one message and what to type). 1: a bug in luthier (prints a traceback).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import typer

from luthier import __version__
from luthier._util.environment import KEEP_FREED_MEMORY, PREPARED_PRODUCTS
from luthier._util.files import reached_limit, user_error_of
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
    for name, value in PREPARED_PRODUCTS.items():
        os.environ.setdefault(name, value)
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
    _prepare_environment()
    try:
        try:
            _refuse_unusable(sys.argv[1:])
            app()
        finally:
            sys.stdout.flush()  # here, since Python would report a failure later with a traceback
    except BrokenPipeError:  # of ``luthier ... | head``: as other programs, end without a message
        _discard_output()
        sys.exit(1)
    except UserError as e:
        error = e
    except OSError as e:
        if (explained := _explained(e)) is None:
            raise
        error = explained
    except (MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        error = UserError(
            "there is not enough memory",
            "use a smaller model; in training, also: --set train.micro_batch_tokens=0 "
            "--set train.per_device_train_batch_size=1 --set train.gradient_checkpointing=true "
            "--set model.load_in_4bit=true",
        )
    else:
        return
    with suppress(OSError):
        fail(error)
    _discard_output()
    sys.exit(2)


def _prepare_environment() -> None:
    """Make the standard streams usable, whatever they are connected to, and the home directory known."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed (``<&-``); the next file to be opened would get its number
            null = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(null, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream, errors in (
        (sys.stdin, "surrogateescape"),  # bytes that are not text are refused where they are used
        (sys.stdout, "backslashreplace"),  # characters that the console lacks
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - no home: as in containers, for libraries that need one
        os.environ["HOME"] = "/"


def _refuse_unusable(arguments: Sequence[str]) -> None:
    """Raise UserError for bytes that are not text, which no file could hold, and for an empty path or name.

    ``--output-dir "$UNSET"`` would otherwise write to the current directory.
    """
    for before, argument in pairwise(["", *arguments]):
        emptied = argument.startswith("--") and argument.endswith("=")
        option = argument.removesuffix("=") if emptied else before
        if (emptied or not argument) and option not in _MAY_BE_EMPTY:
            name = option if option.startswith("--") else "an argument"
            raise UserError(f"{name}: is empty; is a variable of the shell not set?", "write a value, or leave it out")
        if any("\ud800" <= c <= "\udfff" for c in argument):
            raise UserError(
                f"{argument!r}: contains bytes that are not text in this terminal's encoding",
                "type it in UTF-8, in a terminal with that encoding: export LC_ALL=C.UTF-8",
            )


_MAY_BE_EMPTY = ("--system", "--prompt")


def _explained(error: OSError) -> UserError | None:
    """Explain an error of the operating system that the user can correct; None if its cause is unknown."""
    if "No usable temporary directory" in str(error):
        return UserError("no directory for temporary files can be written", "set TMPDIR to one that can be written")
    if error.filename is not None:
        return user_error_of(Path(os.fsdecode(error.filename)), error)
    if reached := reached_limit(error):
        return UserError(f"the output cannot be written: {reached[0]}", reached[1])
    return None


def _discard_output() -> None:
    """Discard what could not be written: Python would try again when it ends."""
    with suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means lack of memory; torch raises a plain RuntimeError on the CPU, recognised by its text."""
    names = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in names or "can't allocate memory" in str(error)


if __name__ == "__main__":
    main()
