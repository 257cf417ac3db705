"""Model names that can be pulled, their repositories, and the files of a repository that a model needs."""

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
    """A repository on one hub. revision: branch, tag or commit; None: the hub's default branch."""

    hub: str
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"


# the repositories that the tutorials of these model families use
REPOSITORIES: dict[str, tuple[Source, Source]] = {
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
    """Return the name under which a model is stored, and its sources in order of preference.

    If no hub is named, ModelScope is preferred when its client is installed, since whoever installed that extra wants
    it; otherwise Hugging Face. A model of ``REPOSITORIES`` falls back to the other hub if the first cannot be reached.
    Any other repository does not: the same id may belong to someone else there.

    Raises ConfigError if the hub is unknown, ModelError if the name is.
    """
    if hub is not None and hub not in HUBS:
        raise ConfigError(
            f"hub '{hub}' is unknown; known: {', '.join(HUBS)}", f"--from {nearest(hub, HUBS) or HUBS[0]}"
        )
    usable = HUBS if importlib.util.find_spec("modelscope_hub") else HUBS[1:]
    family = next(
        (f for f, both in REPOSITORIES.items() if name.lower() in (f, *(s.repository.lower() for s in both))), ""
    )
    if family:
        named = [s for s in REPOSITORIES[family] if s.repository.lower() == name.lower()]
        first = hub or (named[0].hub if len(named) == 1 else usable[0])
        order = sorted(REPOSITORIES[family], key=lambda s: s.hub != first)
        if revision is not None:
            return family, [Source(first, order[0].repository, revision)]
        return family, [s for s in order if s.hub == first or (hub is None and s.hub in usable)]
    if _REPOSITORY.fullmatch(name):
        return name, [Source(hub or usable[0], name, revision)]
    known = [*embedded, *REPOSITORIES]
    raise ModelError(
        f"model '{name}' is unknown; known: {', '.join(known)}, and OWNER/NAME of any repository",
        f"luthier pull {nearest(name.lower(), known) or known[0]}",
    )


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a hub lists it. size in bytes; digests in hex. Both hubs' own servers list at least one digest.

    blob: git's object id, SHA-1 over ``blob SIZE\\0`` and the content; Hugging Face lists it for small files.
    """

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    def matches(self, path: Path) -> bool:
        """Whether ``path`` has this file's size and digest."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return files.sha256(path) == self.sha256
        if self.blob is not None:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            digest.update(path.read_bytes())
            return digest.hexdigest() == self.blob
        return True


class Hub(Protocol):
    """A model hub, used through its own client library.

    Both methods raise ModelError, or UnreachableError if a retry may help.
    """

    title: str
    retries: int  # consecutive retries without progress, in addition to the client's own

    def list(self, source: Source) -> tuple[str, list[RemoteFile]]:
        """Return the resolved revision and every file at that revision.

        The resolved revision is a commit if the hub's client reports one, otherwise a branch or tag.
        """
        ...

    def fetch(self, source: Source, revision: str, file: RemoteFile, folder: Path) -> None:
        """Download ``folder / file.path``, resuming from ``file.path + PART`` if an earlier call was interrupted."""
        ...


class UnreachableError(ModelError):
    """The hub does not answer, or the connection broke; a retry or another hub may work."""


def corrupt(title: str, file: RemoteFile) -> ModelError:
    """Return the error for a file that was downloaded more than once and never matched the hub's listing."""
    return ModelError(
        f"{file.path}: the file from {title} does not match its listed size ({file.size} bytes) or digest, repeatedly",
        "run the same command again later (the other files are kept), or choose another hub with --from",
    )


PART = ".incomplete"  # suffix of a partial file, the same in both clients
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
_WEIGHTS = (  # (single file, shards, index of the shards); safetensors is preferred to pickles
    (re.compile(r"model\.safetensors"), re.compile(r"model-\d+-of-\d+\.safetensors"), "model.safetensors.index.json"),
    (re.compile(r"pytorch_model\.bin"), re.compile(r"pytorch_model-\d+-of-\d+\.bin"), "pytorch_model.bin.index.json"),
)


def model_files(source: Source, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Select the files that a model is read from, weights last.

    Leaves out code, pickles if there are safetensors, and everything in subdirectories. Raises ModelError if
    config.json or the weights are missing.
    """
    small = [f for f in listed if f.path in _SMALL]
    for single, shard, index in _WEIGHTS:
        weights = [f for f in listed if single.fullmatch(f.path)]
        shards = [f for f in listed if shard.fullmatch(f.path) or f.path == index]
        if any(f.path == index for f in shards) and len(shards) > 1:
            weights = shards
        if weights and any(f.path == "config.json" for f in small):
            return [*sorted(small, key=lambda f: f.path), *sorted(weights, key=lambda f: f.path)]
    raise ModelError(
        f"{source}: contains no readable model: config.json or the weights (safetensors or .bin) are missing",
        "choose the repository with the original weights",
    )
