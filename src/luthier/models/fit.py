"""Whether a checkpoint's tensors are a model's, decided from names and shapes alone, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.models.families import Rule

Shape = tuple[int, ...]
# tables that older checkpoints carry and every native class computes for itself
_BUFFERS = re.compile(r"(.*\.)?(inv_freq|rotary_emb\.\w+_cached|masked_bias|rotary_pos_emb\.\w+)")


@dataclass(slots=True)
class Fit:
    """rules: published name -> what becomes of it; ignored: known buffers; missing: native names that tie to others."""

    rules: dict[str, Rule] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def told(self, limit: int = 20) -> str:
        more = f"; and {len(self.problems) - limit} more" if len(self.problems) > limit else ""
        return "; ".join(self.problems[:limit]) + more


def match(shapes: Mapping[str, Shape], rules: Sequence[Rule], model: Any) -> Fit:
    """Hold a checkpoint's headers against a model on the meta device.

    rules: the family's; empty: published names are the native ones.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    known = {r.source: r for r in rules or (Rule(name, (name,)) for name in expected)}
    fit, wrong = Fit(), dict[str, str]()
    for name, shape in shapes.items():
        rule = known.get(name)
        if rule is None:
            ignored = _BUFFERS.fullmatch(name) or _on_its_list(model, name)
            (fit.ignored if ignored else fit.problems).append(name if ignored else f"unexpected: {name}")
            continue
        fit.rules[name] = rule
        needed = _shape(rule, expected)
        if needed != shape:
            wrong[name] = f"mismatched: {name} is {list(shape)}, expected {list(needed)}"
    there = {part for rule in fit.rules.values() for part in rule.parts}
    missing = [name for name in expected if name not in there]
    pairs = {**tied, **{source: target for target, source in tied.items()}}
    fit.missing = [name for name in missing if pairs.get(name) in there]
    lost = [name for name in missing if name not in fit.missing]
    source = {part: rule.source for rule in known.values() for part in rule.parts}
    absent = dict.fromkeys(source.get(name, name) for name in lost)
    fit.problems = [
        *(f"missing: {name}" for name in collapse(absent)),
        *(f"unexpected: {name}" for name in collapse(p.removeprefix("unexpected: ") for p in fit.problems)),
        *wrong.values(),
    ]
    return fit


def collapse(names: Iterable[str]) -> list[str]:
    """``model.layers.0-31.mlp.up_proj.weight`` for 32 names that differ in the layer alone."""
    groups: dict[str, list[int | None]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        key = name[: found.start(1)] + "{}" + name[found.end(1) :] if found else name
        groups.setdefault(key, []).append(int(found.group(1)) if found else None)
    return [key.replace("{}", _numbers([n for n in found if n is not None])) for key, found in groups.items()]


def _numbers(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _shape(rule: Rule, expected: Mapping[str, Shape]) -> Shape:
    parts = [expected[name] for name in rule.parts]
    return (sum(p[0] for p in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]


def _on_its_list(model: Any, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(p, name) for p in patterns)
