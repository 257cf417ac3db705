"""The content of the cache of encoded rows is a golden file; if it changes, ``row_cache.FORMAT`` must be increased.

Otherwise a newer version would train on rows that an older one encoded differently. A second test changes one token and
expects the comparison to fail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import config as configs
from luthier.encoding import row_cache
from luthier.encoding.encoder import Encoder
from luthier.verbs.check import inspect
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "encoded-rows.json"
TURNS = [("user", "Who are you?"), ("assistant", "Marlow."), ("user", "你好"), ("assistant", "Aye, aye.")]
ROWS: list[dict[str, Any]] = [
    {"instruction": "Who are you?", "input": "", "output": "Gannet Rock here."},
    {"instruction": "Tell me", "input": "a story", "output": "The lamp is lit. " * 40, "system": "Be brief."},
    {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    {"instruction": "dropped", "output": ""},
    {"instruction": "held out, perhaps", "output": "Yes."},
]


def cached(model: Path, folder: Path) -> dict[str, Any]:
    """Return the format number, the report, and a digest of every column file of a cache entry."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    data = {"train": file, "max_length": 64, "eval_fraction": 0.3}
    assert inspect(configs.build({"model": {"path": model}, "data": data})).error is None
    (entry,) = row_cache.root().iterdir()
    account = (entry / "account.json").read_text(encoding="utf-8").replace(str(folder), "@")
    digests = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(entry.iterdir()) if p.suffix != ".json"
    }
    return {"format": row_cache.FORMAT, "files": digests, "account": json.loads(account)}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "root", lambda: tmp_path / "cache")


def test_encoded_rows_change_only_with_the_format_number(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    written = cached(model_dir("llama"), tmp_path)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"format": None}
    if golden["format"] != written["format"]:
        GOLDEN.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        pytest.fail(f"{GOLDEN} was written: look at it, then commit it")
    assert written == golden, "the same rows are encoded or stored differently: increase row_cache.FORMAT"


def test_a_changed_token_is_detected(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Encoder._fit

    def with_another_token(self: Encoder, *args: Any) -> Any:
        ids, trained = fit(self, *args)  # type: ignore[misc]
        return np.where(np.arange(len(ids)) == 3, 31, ids), trained

    monkeypatch.setattr(Encoder, "_fit", with_another_token)
    assert cached(model_dir("llama"), tmp_path) != json.loads(GOLDEN.read_text(encoding="utf-8"))
