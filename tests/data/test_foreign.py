"""Rows of other tools have the outcome that is written beside them, and that the documentation lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.encoding.encoder import Encoder
from luthier.models.tokenizer.tokenizer import Tokenizer
from luthier.templates import stop_ids
from luthier.types import Template
from tests.conftest import ROOT
from tests.data.foreign import END, ROWS, THINK, Foreign, outcome
from tests.helpers.rows import encode, load
from tests.helpers.trl_templates import template_of, tokenizer_of

PAGE = ROOT / "docs" / "other-tools.md"


@pytest.fixture(scope="module")
def qwen3() -> tuple[Tokenizer, Template]:
    tokenizer = tokenizer_of("qwen3")
    return tokenizer, template_of("qwen3", tokenizer)


@pytest.mark.parametrize("foreign", ROWS, ids=[f"{f.tool}: {f.what}" for f in ROWS])
def test_a_row_of_another_tool_has_its_outcome(
    foreign: Foreign, qwen3: tuple[Tokenizer, Template], tmp_path: Path
) -> None:
    tokenizer, template = qwen3
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(foreign.row)}\n" * 2, encoding="utf-8")
    rows = load(path)
    encoder = Encoder(template, tokenizer, stop_ids(template, tokenizer), 4096)
    trained: list[str] = []
    for example in encode(encoder, rows.conversations, rows.report):
        at = np.flatnonzero(example.trained)
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        trained += [tokenizer.text(example.ids[run]) for run in runs]
    if isinstance(foreign.expected, str):
        assert (trained, rows.report.rows()["dropped"]) == ([], 2)
        assert foreign.expected in rows.report.problems[0].reason
    else:
        assert [t.removeprefix(THINK) for t in trained] == [t + END for t in foreign.expected] * 2


def test_the_documentation_lists_every_row() -> None:
    lines = [f"| {f.tool} | {f.what} | {outcome(f)} |" for f in ROWS]
    page = PAGE.read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| tool")]
    assert table == lines, "\n".join(lines)
    assert len(ROWS) >= 30
