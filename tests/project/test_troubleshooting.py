"""The pages of messages quote the source exactly, in both languages, and explain every message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.conftest import ROOT
from tests.helpers.error_sites import SOURCE

PAGES = {"en": ROOT / "docs" / "troubleshooting.md", "zh": ROOT / "docs" / "zh" / "troubleshooting.md"}
_VALUE = "..."  # stands for a value in a message; at the end of a quotation also for the rest of the message


def sections(language: str) -> list[tuple[str, str]]:
    """The quoted messages of a page, and the text below each. A heading without code is a symptom, not a message."""
    parts = re.split(r"^#{2,3} (.+)$", PAGES[language].read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(heading[1:-1], body.strip()) for heading, body in pairs if re.fullmatch("`[^`]+`", heading)]


def quoted(language: str) -> list[str]:
    return [message for message, _ in sections(language)]


def without_repeated_values(text: str) -> str:
    return re.sub(r"\.\.\.(?: \.\.\.)+", _VALUE, text)


def strings(code: str) -> Iterator[str]:
    """Every string of a file that is not a docstring, values of f-strings as ``...``."""
    tree = ast.parse(code)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}  # a part of a message is not a message
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else _VALUE for part in node.values)


@cache
def messages() -> frozenset[str]:
    """Every string of the source, in the form of a quotation."""
    files = sorted(SOURCE.rglob("*.py"))
    return frozenset(without_repeated_values(s) for file in files for s in strings(file.read_text(encoding="utf-8")))


def is_in_the_source(quotation: str, among: frozenset[str]) -> bool:
    """Whether a quotation is a whole string of the source, or its beginning if it ends with ``...``."""
    text = without_repeated_values(quotation)
    if text in among:
        return True
    return text.endswith(_VALUE) and any(s.startswith(text.removesuffix(_VALUE)) for s in among)


@pytest.mark.parametrize("language", PAGES)
def test_every_quoted_message_is_in_the_source(language: str) -> None:
    assert [m for m in quoted(language) if not is_in_the_source(m, messages())] == []


@pytest.mark.parametrize("message", quoted("en"))
def test_a_message_with_another_wording_is_not_in_the_source(message: str) -> None:
    """Each quotation is specific enough that a change of any of its words is noticed."""
    words = list(re.finditer(r"[A-Za-z]{2,}", message))
    assert len(words) >= 2, "quote more of this message"
    for word in words:
        changed = message[: word.start()] + "other" + word.group() + message[word.end() :]
        assert not is_in_the_source(changed, messages()), changed


def test_both_languages_quote_the_same_messages_in_the_same_order() -> None:
    assert quoted("en") == quoted("zh")
    assert len(set(quoted("en"))) == len(quoted("en"))


def test_the_page_has_the_messages_that_users_meet() -> None:
    assert len(quoted("en")) >= 30


@pytest.mark.parametrize("language", PAGES)
def test_every_message_is_explained(language: str) -> None:
    assert [message for message, body in sections(language) if len(body) < 20] == []


def test_both_languages_show_the_same_commands() -> None:
    blocks = [re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES.values()]
    assert blocks[0] == blocks[1]
    assert blocks[0]


def test_strings_are_collected_as_they_are_quoted() -> None:
    code = '''
def f(a, b):
    """A docstring."""
    raise E(f"{a}: is " f"damaged ({b!r})", "a " "fix", f"{a} {b}: ends")
'''
    assert set(strings(code)) == {"...: is damaged (...)", "a fix", "... ...: ends"}
    among = frozenset(map(without_repeated_values, strings(code)))
    assert is_in_the_source("...: is damaged (...)", among)
    assert is_in_the_source("...: ends", among)
    assert is_in_the_source("...: is ...", among)
    assert not is_in_the_source("...: is", among)
    assert not is_in_the_source("A docstring.", among)
    assert not is_in_the_source("is damaged (...)", among)
