"""``luthier demo`` on a tiny random model: the report shows every held-out reply before and after training."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier import personas
from luthier.config import RunConfig
from luthier.verbs import demo


def test_the_report_shows_the_held_out_replies(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = model_dir("llama"), tmp_path / "run"

    def small(base: Path, output_dir: Path) -> RunConfig:
        config = personas.config(base, output_dir)
        train = config.train.model_copy(update={"max_steps": 2})
        chosen = config.model.model_copy(update={"dtype": "float32"})
        return config.model_copy(update={"train": train, "model": chosen})

    monkeypatch.setattr(demo, "pull", lambda *_, **__: model)
    monkeypatch.setattr(demo, "demo_config", small)
    result = demo.demo(run)

    samples = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["samples"]
    assert [s["prompt"] for s in samples] == result.prompts
    assert [s["tuned"] for s in samples] == [r.text for r in result.tuned_replies]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Replies to held-out prompts" in page
    assert all(html.escape(prompt) in page for prompt in result.prompts)
