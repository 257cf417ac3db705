"""YAML as people write it in settings."""

from __future__ import annotations

import re
from typing import Any

import yaml

from luthier.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; everyone who types it means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number form
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(e).split())})", "correct the text") from None
