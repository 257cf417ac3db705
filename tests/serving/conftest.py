"""Fixtures of several files of tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.llama import cache_at


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of llama.cpp's files, in a cache of the module that is separate from the user's."""
    with cache_at(tmp_path_factory.mktemp("cache")) as path:
        yield path
