"""``luthier``: the verbs, and errors turned into exit codes.

0 done, 2 the user must act (one message and what to type), 1 our bug (a traceback to send us).
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import typer

from luthier import __version__
from luthier._util.environment import KEEP_FREED_MEMORY
from luthier._util.files import mishap
from luthier.cli import chat, check, demo, doctor, estimate, export, init, merge, pull, serve, train
from luthier.cli import eval as evaluate
from luthier.cli.common import fail
from luthier.errors import UserError

app = typer.Typer(
    name="luthier",
    help="Fine-tune chat models with LoRA and QLoRA on the machine you have, and talk to the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    keep_freed_memory: bool = typer.Option(
        True,
        envvar=KEEP_FREED_MEMORY,
        help="Let the process keep memory that it freed (glibc's mallopt): training is 10 to 30 % faster.",
    ),
) -> None:
    os.environ[KEEP_FREED_MEMORY] = "1" if keep_freed_memory else "0"
    if version:
        print(f"luthier {__version__}")
        raise typer.Exit


app.command("demo", short_help="The whole story on a small model, in minutes.")(demo.run)
app.command("pull", short_help="Download a model and check it.")(pull.run)
app.command("init", short_help="Write a run.yaml with every setting explained.")(init.run)
app.command("check", short_help="Prove data, template and targets; trains nothing.")(check.run)
app.command("estimate", short_help="Memory and time of a run, before it starts.")(estimate.run)
app.command("train", short_help="Train an adapter.")(train.run)
app.command("eval", short_help="Base and tuned model on held-out rows, side by side.")(evaluate.run)
app.command("chat", short_help="Talk to a run, an adapter or a base model.")(chat.run)
app.command("merge", short_help="Base and adapter as one plain model.")(merge.run)
app.command("export", short_help="The adapter in another tool's format.")(export.run)
app.command("serve", short_help="Serve runs to clients of OpenAI's protocol.")(serve.run)
app.command("doctor", short_help="Show what this machine can do; try one step.")(doctor.run)


def main() -> None:
    """The entry point of the ``luthier`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that cannot show a character still shows the rest
    try:
        app()
    except UserError as e:
        fail(e)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as e:
        if e.filename is None:
            raise
        fail(mishap(Path(os.fsdecode(e.filename)), e))
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        fail(
            UserError(
                "there is not enough memory",
                "--set train.per_device_train_batch_size=1 --set train.gradient_checkpointing=true, or a smaller model",
            )
        )
        sys.exit(2)


def _out_of_memory(error: Exception) -> bool:
    """torch's own error on a GPU; on the CPU a RuntimeError whose text tells."""
    names = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in names or "can't allocate memory" in str(error)


if __name__ == "__main__":
    main()
