"""Read a user's YAML strictly, and turn pydantic's errors into messages with what to type.

There is one message per key; an unknown key is reported with its nearest name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from luthier._util.files import user_path
from luthier.errors import ConfigError, nearest
from luthier.types import DATA_SUFFIXES

Mistake = tuple[str, str]  # what is wrong, and what to type


def mistakes(
    errors: Iterable[ErrorDetails],
    fields: Mapping[str, FieldInfo],
    other_names: Mapping[str, str],
    options: Mapping[str, str],
) -> list[Mistake]:
    """Explain errors; alternatives of one value (``auto`` or a number) become one message.

    fields: by dotted key. other_names: keys by the names that other tools use. options: what gives a required key.
    """
    by_place: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_place.setdefault(_place(error, fields), []).append(error)
    # a list is reported as too short if its only element was refused; the element's error says more
    causes = [p for p in by_place if not any(other.startswith(f"{p}.") for other in by_place)]
    return [_mistake(place, by_place[place], fields, other_names, options) for place in causes]


def _place(error: ErrorDetails, fields: Mapping[str, FieldInfo]) -> str:
    """The dotted key of an error, without the alternative that pydantic tried, such as ``bool``."""
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts[:2])
    several = key in fields and get_origin(fields[key].annotation) in (Union, UnionType)
    return key if several else ".".join(parts)


def _mistake(
    place: str,
    errors: Sequence[ErrorDetails],
    fields: Mapping[str, FieldInfo],
    other_names: Mapping[str, str],
    options: Mapping[str, str],
) -> Mistake:
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        leaf = {**{key.rpartition(".")[2]: key for key in fields}, **other_names}
        name = place.rpartition(".")[2]
        guess = leaf.get(name) or leaf.get(nearest(name, leaf, cutoff=0.7) or "")
        hint = f"; did you mean {guess}?" if guess else ""
        return f"{place}: unknown key{hint}", f"write {guess}" if guess else f"the keys are: {', '.join(fields)}"
    if kind == "missing":
        return f"{place}: is missing", f"give {options.get(place, f'--set {place}=VALUE')}"
    problems = [error["msg"].removeprefix("Value error, ") for error in errors]
    whole = " or ".join([problems[0], *(p.removeprefix("Input should be ") for p in problems[1:])])
    example = _example(place, errors[0].get("input"), fields[place]) if place in fields else ""
    return f"{place}: {whole[0].lower()}{whole[1:]}, got {errors[0].get('input')!r}", f"correct {place}{example}"


def _example(key: str, got: object, field: FieldInfo) -> str:
    """A value that is accepted: the nearest of several choices, else the default."""
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    value = nearest(str(got), choices) or field.get_default(call_default_factory=True, validated_data={})
    if field.is_required() or value in (None, "", (), {}):
        return ""
    return f", as --set {key}={value if isinstance(value, str) else json.dumps(value)}"


class _Loader(yaml.SafeLoader):
    """Read ``1e-4`` as a number, which YAML 1.1 does not, and collect keys that occur twice: YAML would lose one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:
        """Compare the keys as they are written: those of a merged mapping (``<<``), added later, may be replaced."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    self.duplicates.append(f"line {line}: key '{key.value}' occurs twice, first in line {lines[name]}")
                lines.setdefault(name, line)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> object:
    """Read YAML without any of its object tags. Raises ConfigError that begins with ``where``."""
    try:
        loader = _Loader(text)
        value: object = loader.get_single_data()
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(e).split())})", "correct the text") from None
    if loader.duplicates:
        raise ConfigError(
            "\n".join(f"{where}, {duplicate}" for duplicate in loader.duplicates),
            "delete one of the two, or join them if they are sections",
        )
    return value


def read_yaml(path: Path | str) -> dict[str, object]:
    """Read the values of a YAML file, without checking them. Raises UserError."""
    path = user_path(path)
    data_file = ConfigError(f"{path}: is a data file, not a run.yaml", f"give it with --data {path}")
    if path.suffix in DATA_SUFFIXES and path.suffix != ".json" and path.is_file():
        raise data_file
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{path}: cannot be read ({reason})", _yaml_instead_of(path)) from None
    values = parse_yaml(text, str(path))
    if isinstance(values, list) and path.suffix in DATA_SUFFIXES:
        raise data_file
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: contains no keys", "write at least model.path and data.train")
    return values


def _yaml_instead_of(path: Path) -> str:
    """Return the fix for a path that is not a YAML file: the one in a run's directory, or the nearest name."""
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    guess = "run.yaml" if (path / "run.yaml").is_file() else nearest(path.name, names)
    folder = path if path.is_dir() else path.parent
    return f"did you mean {folder / guess}?" if guess else "give the path of a YAML file"
