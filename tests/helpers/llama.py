"""Compare replies of llama.cpp with luthier's own, and keep its files in a cache of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luthier._util.environment import CACHE


@contextmanager
def cache_at(path: Path) -> Iterator[Path]:
    """Use a cache that is separate from the user's within the block; yields the directory of llama.cpp's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(path))
        yield path / "llama.cpp"


def alike(one: str, other: str) -> bool:
    """Whether two replies agree up to bytes that are no text, which llama.cpp decodes differently or leaves out."""
    one, other = (text.split("\ufffd")[0] for text in (one, other))
    return one.startswith(other) or other.startswith(one)
