"""Read YAML safely and strictly: ``1e-4`` is a number, and a key that occurs twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from luthier.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Read ``1e-4`` as a number, which YAML 1.1 does not, and collect keys that occur twice: YAML would lose one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
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
