"""Write ``report.html``: settings and results of a run on one self-contained page (no scripts, no network)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier._util import files
from luthier.adapters.run_dir import Summary
from luthier.config import RunConfig, all_keys, describe

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #667; --line: #d0d7de; --blue: #0969da; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --dim: #9aa4b0; --line: #3d444d; --blue: #58a6ff; --paper: #0d1117; }
}
body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; } td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
.figures div { min-width: 7rem; } .figures b { display: block; font-size: 1.5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.curve { fill: none; stroke: var(--blue); stroke-width: 2; } .faint { opacity: .35; stroke-width: 1; }
.grid { stroke: var(--line); } .bar { fill: var(--blue); } details summary { cursor: pointer; color: var(--dim); }
"""
_TEXT_METRICS = {
    "length_ratio": ("reply length / reference length", ".2f"),
    "bleu": ("BLEU", ".1f"),
    "chrf": ("chrF", ".1f"),
    "rouge_l": ("ROUGE-L", ".3f"),
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 240, 64, 28


def write(run: Path, config: RunConfig, summary: Summary, lengths: Sequence[int]) -> Path:
    """Write ``RUN/report.html`` from the files of the run; returns its path. lengths: tokens per training row."""
    target = run / "report.html"
    metrics = _lines(run / "metrics.jsonl")
    evaluation = run / "evaluation.json"
    results = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None
    files.write_text(target, render(run.name, config, summary, metrics, lengths, results))
    return target


def render(
    name: str,
    config: RunConfig,
    summary: Summary,
    metrics: Sequence[Mapping[str, object]],
    lengths: Sequence[int],
    results: Mapping[str, object] | None,
) -> str:
    """Return the HTML of the page.

    summary, metrics, results: the contents of summary.json, metrics.jsonl and evaluation.json.
    lengths: tokens per training row.
    """
    losses = summary["losses"]
    parts = [
        f"<h1>luthier: {html.escape(name)}</h1>",
        _figures(summary, results),
        "<h2>Training loss per token</h2>",
        _chart([(range(1, len(losses) + 1), losses, "curve faint"), _smooth(losses)]),
        "<h2>Learning rate</h2>",
        _chart([([_number(m, "step") for m in metrics], [_number(m, "learning_rate") for m in metrics], "curve")]),
        "<h2>Row length in tokens</h2>",
        _histogram(lengths),
    ]
    if results and (samples := _sections(results, "samples")):
        which = "held-out" if results["data"] else "training"
        parts += [f"<h2>Replies to {which} prompts</h2>", _samples(samples)]
    parts += ["<h2>Model and data</h2>", _trained(config, summary), "<h2>Settings</h2>", _settings(config)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>luthier: {html.escape(name)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _figures(summary: Summary, results: Mapping[str, object] | None) -> str:
    losses = summary["losses"]
    figures = {
        "steps": f"{summary['steps']:,}",
        "training loss, first to last step": f"{losses[0]:.3f} &rarr; {losses[-1]:.3f}",
        "training time": f"{summary['train_seconds']:,.0f} s",
        "tokens per second": f"{summary['tokens_per_s']:,.0f}",
        "peak memory": f"{summary['peak_rss_bytes'] / 1e9:.2f} GB",
    }
    if results and results["data"]:
        base, tuned = _section(results, "base"), _section(results, "tuned")
        figures["held-out loss, base to tuned"] = f"{base['loss']:.3f} &rarr; {tuned['loss']:.3f}"
        if tuned["stop_rate"] is not None:
            figures["tuned replies that end with a stop token"] = f"{tuned['stop_rate']:.0%}"
        for key, (name, form) in _TEXT_METRICS.items():
            if base[key] is not None and tuned[key] is not None:
                figures[f"{name}, base to tuned"] = f"{base[key]:{form}} &rarr; {tuned[key]:{form}}"
    return '<div class="figures">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in figures.items()) + "</div>"


def _trained(config: RunConfig, summary: Summary) -> str:
    rows, share = summary["rows"], summary["trainable_parameters"] / summary["parameters"]
    facts = {
        "model": f"{config.model.path} ({summary['dtype']} on {summary['device']})",
        "adapter": f"LoRA r={config.lora.r}, alpha={config.lora.lora_alpha:g}",
        "target modules": ", ".join(summary["target_modules"]),
        "parameters": f"{summary['trainable_parameters']:,} of {summary['parameters']:,} are trained ({share:.2%})",
        "rows": f"{rows['read']} read, {rows['kept']} kept, {rows['dropped']} dropped, {rows['changed']} changed",
        "tokens": f"{summary['tokens']:,} processed, {summary['supervised_tokens']:,} of them in the loss",
        "template": f"{summary['template']}; system prompt: {config.data.system or 'the template’s default, if any'}",
    }
    return _table([], [[k, v] for k, v in facts.items()])


def _settings(config: RunConfig) -> str:
    rows = []
    for key in all_keys():
        value: object = config.dump()
        for part in key.split("."):
            assert isinstance(value, dict)
            value = value[part]
        rows.append([key, json.dumps(value, ensure_ascii=False), describe(key)])
    return f"<details><summary>all {len(rows)} settings</summary>{_table(['key', 'value', ''], rows)}</details>"


def _samples(samples: Sequence[Mapping[str, object]]) -> str:
    rows = [[s["prompt"], s["base"], s["tuned"], s["reference"]] for s in samples]
    return _table(["prompt", "base model", "tuned model", "reference reply"], rows, "text")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    top = "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>" if head else ""
    cell = f'<td class="{kind}">' if kind else "<td>"
    body = "".join("<tr>" + "".join(f"{cell}{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _smooth(values: Sequence[float]) -> tuple[Sequence[int], list[float], str]:
    """Compute a running mean over a twentieth of the run (fewer values at the start)."""
    window = max(1, len(values) // 20)
    parts = [values[max(0, i - window) : i + 1] for i in range(len(values))]
    return range(1, len(values) + 1), [sum(p) / len(p) for p in parts], "curve"


def _chart(series: Sequence[tuple[Sequence[float], Sequence[float], str]]) -> str:
    """Draw lines on one grid, as SVG."""
    xs = [x for s in series for x in s[0]]
    ys = [y for s in series for y in s[1]]
    low, high = min([0.0, *ys]) if min(ys) < max(ys) * 0.5 else min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    first, last = min(xs), max(*xs, min(xs) + 1)

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - 8)
        return f"{across:.1f},{8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8):.1f}"

    lines = [
        f'<polyline class="{kind}" points="{" ".join(place(x, y) for x, y in zip(a, b, strict=True))}"/>'
        for a, b, kind in series
    ]
    return _frame([low + (high - low) * i / 4 for i in range(5)], low, high, first, last, lines)


def _histogram(lengths: Sequence[int]) -> str:
    """Draw the number of rows per range of lengths in at most 24 bars, as SVG."""
    low, high = min(lengths), max(lengths) + 1
    width = max(1, -(-(high - low) // 24))
    counts = [0] * (-(-(high - low) // width))
    for n in lengths:
        counts[(n - low) // width] += 1
    most = -(-max(counts) // 4) * 4  # so that the ticks are whole numbers of rows
    step = (_WIDTH - _LEFT - 8) / len(counts)
    room = _HEIGHT - _BOTTOM - 8
    bars = [
        f'<rect class="bar" x="{_LEFT + i * step + 1:.1f}" y="{8 + room * (1 - c / most):.1f}" '
        f'width="{max(step - 2, 1):.1f}" height="{room * c / most:.1f}"/>'
        for i, c in enumerate(counts)
    ]
    return _frame([most * i / 4 for i in range(5)], 0, most, low, low + width * len(counts) - 1, bars)


def _frame(ticks: Sequence[float], low: float, high: float, first: float, last: float, inside: Sequence[str]) -> str:
    room = _HEIGHT - _BOTTOM - 8
    grid = []
    for t in ticks:
        y = 8 + (high - t) / (high - low) * room
        grid.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{t:.3g}</text>')
    foot = f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{first:g}</text>'
    foot += f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{last:g}</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join([*grid, *inside])}{foot}</svg>'


def _number(record: Mapping[str, object], key: str) -> float:
    value = record[key]
    assert isinstance(value, int | float)
    return value


def _section(record: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = record[key]
    assert isinstance(value, Mapping)
    return value


def _sections(record: Mapping[str, object], key: str) -> Sequence[Mapping[str, object]]:
    value = record[key]
    assert isinstance(value, list)
    return value


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
