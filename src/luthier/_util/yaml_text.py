"""Read YAML safely, with numbers such as ``1e-4`` read as numbers."""

from __future__ import annotations

import re

import yaml

from luthier.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Read ``1e-4`` as a number, which YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> object:
    """Read YAML without any of its object tags. Raises ConfigError that begins with ``where``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number form
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(e).split())})", "correct the text") from None
