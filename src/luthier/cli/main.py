"""``luthier``: the verbs, and errors turned into exit codes.

0 done, 2 the user must act (one message and what to type), 1 our bug (a traceback to send us).
"""

from __future__ import annotations

import sys

import typer

from luthier import __version__
from luthier.cli import chat, check, demo, pull, train
from luthier.cli.console import fail
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
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        print(f"luthier {__version__}")
        raise typer.Exit


app.command("demo", short_help="The whole story on a small model, in minutes.")(demo.run)
app.command("pull", short_help="Download a model and check it.")(pull.run)
app.command("check", short_help="Prove data, template and targets; trains nothing.")(check.run)
app.command("train", short_help="Train an adapter.")(train.run)
app.command("chat", short_help="Talk to a run, an adapter or a base model.")(chat.run)


def main() -> None:
    """The entry point of the ``luthier`` command."""
    try:
        app()
    except UserError as e:
        fail(e)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
