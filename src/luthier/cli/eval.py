"""The options and output of ``luthier eval``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.common import (
    AdapterOption,
    CheckpointOption,
    DataOption,
    FusedOption,
    JsonOption,
    ModelOption,
    importing,
    print_stderr,
)

if TYPE_CHECKING:
    from luthier.evaluation.scoring import Comparison


def run(
    path: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run or an adapter directory.")] = None,
    data: DataOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    checkpoint: CheckpointOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="auto (fp32 on CPU), float32, bfloat16 or float16.")
    ] = "auto",
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=0, help="Number of prompts that both models answer.")
    ] = 24,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply in tokens.")
    ] = 200,
    fused: FusedOption = True,
    as_json: JsonOption = False,
) -> None:
    """Compare base and tuned model on held-out rows: those of the run, or those of --data.

    Loss and perplexity are computed on all rows. Both models then answer some of the prompts, always with the most
    likely token, and the replies are compared with those of the rows (BLEU, chrF, ROUGE-L; jieba segments Chinese).
    """
    from luthier.evaluation import text_metrics

    with importing():
        from luthier.verbs.eval import eval as evaluate

    result = evaluate(path, data or (), dtype, model, adapter, checkpoint, samples, max_new_tokens, print_stderr, fused)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
    if note := text_metrics.note():
        print_stderr(f"note: {note}")


def _print(result: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    both = (result.base, result.tuned)
    table = Table(title=f"{result.tuned.held_out.rows} held-out rows, {len(result.prompts)} answered, {result.dtype}")
    for name in ("", "base", "tuned"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, values: Iterable[float | None], form: str) -> None:
        pair = list(values)
        if pair != [None, None]:
            table.add_row(name, *("-" if v is None else format(v, form) for v in pair))

    row("loss (nats per token)", (s.held_out.loss for s in both), ".4f")
    row("perplexity", (s.held_out.perplexity for s in both), ".2f")
    row("replies that end with a stop token", (s.stop_rate for s in both), ".0%")
    row("length of replies / references", (s.text.length_ratio for s in both), ".2f")
    row("BLEU (0 to 100)", (s.text.bleu for s in both), ".2f")
    row("chrF (0 to 100)", (s.text.chrf for s in both), ".2f")
    row("ROUGE-L (0 to 1)", (s.text.rouge_l for s in both), ".4f")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"rows: {result.data}", markup=False)
