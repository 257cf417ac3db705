"""``report.html``: one self-contained page with all results, in which the text of rows is escaped."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import luthier
from luthier import config as configs
from luthier import personas


@pytest.fixture(scope="module")
def page(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = folder / "rows.jsonl"
    rows.write_text(personas.TEAHOUSE.read_text(encoding="utf-8"), encoding="utf-8")
    held = folder / "held.jsonl"
    held.write_text(
        '{"instruction": "<script>alert(1)</script> & 你好", "output": "</td><b>x</b>"}\n', encoding="utf-8"
    )
    run_config = configs.build(
        {
            "model": {"path": model_dir("llama")},
            "data": {"train": rows, "eval": held},
            "train": {"max_steps": 40, "learning_rate": 5e-3, "eval_time_ratio": 5, "per_device_train_batch_size": 2},
            "output_dir": folder / "run",
        }
    )
    luthier.train(run_config)
    return folder / "run" / "report.html"


def test_the_page_has_all_parts_and_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in (
        "<h2>Training loss per token</h2>",
        "<h2>Learning rate</h2>",
        "<h2>Row length in tokens</h2>",
        "<h2>Replies to held-out prompts</h2>",
        "<h2>Model and data</h2>",
        "q_proj",
        "tokens per second",
        "held-out loss, base to tuned",
    ):
        assert part in text
    assert text.count("<svg") == 3
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    for key in configs.all_keys():
        assert f"<td>{key}</td>" in text
    points = re.findall(r'class="curve faint" points="([^"]+)"', text)[0].split()
    assert len(points) == 40


def test_without_held_out_rows_the_page_shows_training_prompts(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    run_config = configs.build(
        {
            "model": {"path": model_dir("llama")},
            "data": {"train": personas.TEAHOUSE},
            "train": {"max_steps": 30, "eval_time_ratio": 10},
            "output_dir": tmp_path / "run",
        }
    )
    luthier.train(run_config)
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Replies to training prompts</h2>" in text
    assert "你是谁？" in text
    assert "held-out loss" not in text


def test_text_of_rows_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; 你好" in text
    assert "&lt;/td&gt;&lt;b&gt;x&lt;/b&gt;" in text
    open_tags: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "line", "rect", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "rect", "polyline"):
                assert open_tags.pop() == tag

    Balanced().feed(text)
    assert open_tags == []


def test_a_browser_draws_the_charts(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not installed")
    shot = tmp_path / "report.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,2400",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.rint(imread(shot)[..., :3] * 255)
    blue = (np.abs(pixels - (0x09, 0x69, 0xDA)) < 8).all(axis=2)
    assert blue.sum() > 3_000
    drawn = np.flatnonzero(blue.any(axis=1))
    charts = np.split(drawn, np.flatnonzero(np.diff(drawn) > 40) + 1)
    assert len(charts) == 3  # loss, learning rate and rows, one below the other
    for chart in charts:
        across = np.flatnonzero(blue[chart].any(axis=0))
        assert across[-1] - across[0] > 700  # of 1000 pixels
