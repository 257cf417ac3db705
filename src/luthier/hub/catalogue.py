"""What can be pulled: names, the repositories they stand for, and which files of a repository make a model."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier._util import files
from luthier.errors import ConfigError, ModelError, nearest

HUBS = ("modelscope", "huggingface")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A repository on one hub. revision: branch, tag or commit; None is the hub's own default branch."""

    hub: str
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"


# the repositories by which the tutorials of these families name them
FAMILIES: dict[str, tuple[Source, Source]] = {
    "yi-6b-chat": (Source("modelscope", "01ai/Yi-6B-Chat"), Source("huggingface", "01-ai/Yi-6B-Chat")),
    "phi-3-mini-4k-instruct": (
        Source("modelscope", "LLM-Research/Phi-3-mini-4k-instruct"),
        Source("huggingface", "microsoft/Phi-3-mini-4k-instruct"),
    ),
    "baichuan2-7b-chat": (
        Source("modelscope", "baichuan-inc/Baichuan2-7B-Chat", "v1.0.4"),
        Source("huggingface", "baichuan-inc/Baichuan2-7B-Chat"),
    ),
    "glm-4-9b-chat": (Source("modelscope", "ZhipuAI/glm-4-9b-chat"), Source("huggingface", "THUDM/glm-4-9b-chat")),
    "glm-4-9b-chat-hf": (
        Source("modelscope", "ZhipuAI/glm-4-9b-chat-hf"),
        Source("huggingface", "THUDM/glm-4-9b-chat-hf"),
    ),
    "deepseek-llm-7b-chat": (
        Source("modelscope", "deepseek-ai/deepseek-llm-7b-chat"),
        Source("huggingface", "deepseek-ai/deepseek-llm-7b-chat"),
    ),
}


def sources(name: str, hub: str | None, revision: str | None, embedded: Sequence[str]) -> tuple[str, list[Source]]:
    """The name under which a model is kept, and where to look for it, best first.

    Where no hub is named: ModelScope if its client is installed, since whoever installed that extra wants it;
    otherwise Hugging Face. A model of ``FAMILIES`` may also come from the other one of the two when the first cannot
    be reached. Any other repository may not: the same id may be someone else's there.
    """
    if hub is not None and hub not in HUBS:
        raise ConfigError(
            f"hub '{hub}' is unknown; known: {', '.join(HUBS)}", f"--from {nearest(hub, HUBS) or HUBS[0]}"
        )
    usable = HUBS if importlib.util.find_spec("modelscope_hub") else HUBS[1:]
    family = next((f for f, both in FAMILIES.items() if name.lower() in (f, *(s.repository.lower() for s in both))), "")
    if family:
        named = [s for s in FAMILIES[family] if s.repository.lower() == name.lower()]
        first = hub or (named[0].hub if len(named) == 1 else usable[0])
        order = sorted(FAMILIES[family], key=lambda s: s.hub != first)
        if revision is not None:
            return family, [Source(first, order[0].repository, revision)]
        return family, [s for s in order if s.hub == first or (hub is None and s.hub in usable)]
    if _REPOSITORY.fullmatch(name):
        return name, [Source(hub or usable[0], name, revision)]
    known = [*embedded, *FAMILIES]
    raise ModelError(
        f"model '{name}' is unknown; known: {', '.join(known)}, and OWNER/NAME of any repository",
        f"luthier pull {nearest(name.lower(), known) or known[0]}",
    )


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a hub lists it. size in bytes; digests in hex, at least one of them on both hubs' own servers.

    blob: git's object id, SHA-1 over ``blob SIZE\\0`` and the content; Hugging Face gives that for small files.
    """

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    def same(self, path: Path) -> bool:
        """Whether ``path`` is this file, by size and digest."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return files.sha256(path) == self.sha256
        if self.blob is not None:
            found = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            found.update(path.read_bytes())
            return found.hexdigest() == self.blob
        return True


class Hub(Protocol):
    """A place that models come from, spoken to through its own client library.

    Both methods raise ModelError, and UnreachableError where trying again may help.
    """

    title: str
    patience: int  # how often to try again what brings nothing, beyond what the client itself does

    def list(self, source: Source) -> tuple[str, list[RemoteFile]]:
        """The revision that was found (a commit where the hub tells), and every file at it."""
        ...

    def fetch(self, source: Source, revision: str, file: RemoteFile, folder: Path) -> None:
        """Bring ``folder / file.path``, going on from ``file.path + PART`` where an earlier call was cut off."""
        ...


class UnreachableError(ModelError):
    """A hub does not answer, or stopped in the middle; the same again may work, or another hub."""


def corrupt(title: str, file: RemoteFile) -> ModelError:
    """The error for a file that came more than once and was never what the hub lists."""
    return ModelError(
        f"{file.path}: what {title} sends is not what it lists ({file.size} bytes, and their digest), more than once",
        "run the same command again later (the other files are kept), or choose another hub with --from",
    )


PART = ".incomplete"  # what both clients' parts end in
_SMALL = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
_WEIGHTS = (  # one file, its shards, their index; safetensors before pickles
    (re.compile(r"model\.safetensors"), re.compile(r"model-\d+-of-\d+\.safetensors"), "model.safetensors.index.json"),
    (re.compile(r"pytorch_model\.bin"), re.compile(r"pytorch_model-\d+-of-\d+\.bin"), "pytorch_model.bin.index.json"),
)


def needed(source: Source, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    """What a model is read from, weights last: no code, no pickles beside safetensors, nothing in subdirectories."""
    small = [f for f in listed if f.path in _SMALL]
    for single, shard, index in _WEIGHTS:
        weights = [f for f in listed if single.fullmatch(f.path)]
        shards = [f for f in listed if shard.fullmatch(f.path) or f.path == index]
        if any(f.path == index for f in shards) and len(shards) > 1:
            weights = shards
        if weights and any(f.path == "config.json" for f in small):
            return [*sorted(small, key=lambda f: f.path), *sorted(weights, key=lambda f: f.path)]
    raise ModelError(
        f"{source}: is not a model that can be read: it lacks config.json, or weights (safetensors or .bin)",
        "choose the repository with the original weights",
    )
