"""Make the pictures of the documentation: ``python -m tests.helpers.make_pictures FOLDER`` (needs tmux and chromium).

FOLDER holds the files of docs/first-persona.md: rows.jsonl, wen.yaml and the model. Each command runs there in a
terminal of its own, and what the terminal shows in the end becomes the picture. ``luthier demo`` gives those of the
README.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
_BROWSER = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
_PAGE = """<!DOCTYPE html><meta charset="utf-8"><style>{stylesheet}
body {{ background: #0c0c0c; color: #d8d8d8; margin: 14px 18px; }}
pre {{ font: 15px/1.35 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace; margin: 0; }}</style>
<pre><code>{code}</code></pre>"""
_WIDTH, _LINE, _COLUMN, _MARGIN = 100, 20.25, 9.03, 36  # of the terminal, in characters; of the text, in pixels


def terminal(name: str, command: str, folder: Path, lines: int, keys: tuple[str, ...] = ()) -> None:
    """Run a command in a terminal of ``lines`` lines, type ``keys`` when it waits, and save what is on the screen."""
    tmux, ended = ["tmux", "-L", "pictures"], folder / ".ended"
    ended.unlink(missing_ok=True)
    path = shlex.quote(str(Path(sys.executable).parent))
    title = f"printf '\\033[1m$ %s\\033[0m\\n' {shlex.quote(command)}"
    shell = f"PS1=; clear; {title}; PATH={path}:$PATH {command}; touch .ended; sleep 9999"
    size = ["-x", str(_WIDTH), "-y", str(lines)]
    subprocess.run([*tmux, "new-session", "-d", "-s", name, *size, "-c", str(folder), "bash", "-c", shell], check=True)
    for text in keys:
        time.sleep(45)  # the model loads, or the reply to the line before is generated
        subprocess.run([*tmux, "send-keys", "-t", name, text, "Enter"], check=True)
    deadline = time.monotonic() + 900
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    shown = subprocess.run([*tmux, "capture-pane", "-t", name, "-p", "-e"], capture_output=True, text=True, check=True)
    subprocess.run([*tmux, "kill-session", "-t", name], check=True)
    _text_picture(shown.stdout.rstrip(), PICTURES / f"{name}.png")


def _text_picture(ansi: str, to: Path) -> None:
    console = Console(record=True, width=_WIDTH, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(Text.from_ansi(ansi), overflow="ignore", crop=False)
    html = console.export_html(theme=MONOKAI, code_format=_PAGE)
    size = round(_WIDTH * _COLUMN + _MARGIN), round((ansi.count("\n") + 1) * _LINE + _MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html, encoding="utf-8")
        browser(page, to, *size)


def browser(page: Path, to: Path, width: int, height: int) -> None:
    """Save what a browser window of this size shows of a page."""
    command = [*_BROWSER, f"--screenshot={to}", f"--window-size={width},{height}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    chosen = sys.argv[2:] or ["check", "train", "report", "chat", "demo"]
    PICTURES.mkdir(exist_ok=True)
    if "check" in chosen:
        terminal("check", "luthier check wen.yaml --show 1", folder, 40)
    if "train" in chosen:
        shutil.rmtree(folder / "wen", ignore_errors=True)
        terminal("train", "luthier train wen.yaml", folder, 40)
    if "report" in chosen:
        browser(folder / "wen" / "report.html", PICTURES / "report.png", 1000, 2300)
    if "chat" in chosen:
        command = "luthier chat wen --compare --max-new-tokens 100"
        terminal("chat", command, folder, 40, ("What do you do when it rains?", "/quit"))
    if "demo" in chosen:
        terminal("demo", "luthier demo", folder, 60)
        browser(folder / "runs" / "demo" / "report.html", PICTURES / "demo-report.png", 1000, 2400)


if __name__ == "__main__":
    main()
