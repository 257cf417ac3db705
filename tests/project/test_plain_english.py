"""The texts of the project are in plain English: none of the private expressions that a pattern can recognise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

_COUNTED = (
    "tokens?|rows?|lines?|bytes|steps?|elements?|files?|weights?|replies|requests|values?|nodes?|buffers?|objects?|"
    "modules?|functions?|samples?|characters?|numbers?|updates?|figures?|tests?|micro-batch(?:es)?"
)
_PER = (
    "second|step|row|token|segment|epoch|layer|verb|batch|micro-batch|key|case|pass|file|reply|time|block|line|column|"
    "model|module|run|page|side|recipe"
)
# what is forbidden, and what to write instead
FORBIDDEN = {
    rf"\b(?:{_COUNTED}) an? (?:{_PER})\b": "per",
    r"\bso many\b": "N, every N steps",
    r"\b(?:is|are|was|were|be) said\b": "is reported, is logged",
    r"\bwill not do\b": "is not enough, is not accepted",
    r"\bthere already\b": "already exists",
    r"\b[Rr]aises? \w+ where\b": "Raises X if",
    r"\b(?:None|False|True|empty) where\b": "None if",
    r"\b(?:to be|be) had\b": "available",
    r"\bin common\b": "shared",
    r"\bbeginnings\b": "prefixes",
    r"\b(?:is|are) told\b": "is detected, is given",
    r"\btold from\b": "detected by",
    r"\bheld (?:against|to)\b": "compared with, tested against",
    r"\b(?:proofs?|proven|unproven)\b": "verification, verified",
    r"\bspoken to\b": "prompted",
    r"\bthe very\b": "(nothing)",
    r"\b(?:lengths|headers|tests|names|rows|figures|prompt|adapter|this|one|it|base|text|weights?) alone\b": "only",
}
PATTERNS = {re.compile(pattern, re.IGNORECASE): better for pattern, better in FORBIDDEN.items()}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "notebooks" / "texts.yaml",
]
SOURCES = sorted((ROOT / "src" / "luthier").rglob("*.py"))


def expressions(text: str) -> list[str]:
    """The forbidden expressions in a text, each with what to write instead; code in backticks is left out."""
    prose = " ".join(re.sub(r"`+[^`]*`+", "`code`", text).split())
    return [
        f"{match[0]!r}: write {better}" for pattern, better in PATTERNS.items() for match in pattern.finditer(prose)
    ]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, messages and help texts of a source file: every string of several words, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_are_in_plain_english(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert expressions(text) == []


def test_docstrings_messages_and_help_texts_are_in_plain_english() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line} {expression}"
        for path in SOURCES
        for line, text in texts(path)
        for expression in expressions(text)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        "1000 tokens a second", "a checkpoint every so many steps", "what is said of it", "that will not do",
        "the file is there already", "Raises ConfigError where it fails", "None where it is absent",
        "cannot be had here", "what rows have in common", "their beginnings", "the format is told from the keys",
        "is held against the reference", "a proof of the file", "the adapter alone",
    ],
)  # fmt: skip
def test_the_test_sees_each_expression(text: str) -> None:
    assert expressions(text)


def test_code_and_ordinary_sentences_pass() -> None:
    assert expressions("1000 tokens per second, as `tokens a second` of `luthier train`; a row of the table") == []
