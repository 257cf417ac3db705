"""Loading a base in 4 or 8 bits: each weight is quantised as it arrives, and the result kept on disk for the next time.

    checkpoint --one tensor at a time--> native rows --both cores--> packed parts --> the model
                                                                          `--------> cache directory (safetensors)

Neither the checkpoint nor a shard is ever whole in memory. An untied embedding stays on disk: a step needs a few
hundred of its rows. Embedding and head keep 16 bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier._util import files
from luthier.devices.device import trim_freed_memory
from luthier.errors import UserError
from luthier.models.checkpoint_reader import Place, Shards, write_safetensors
from luthier.models.directory import family_of, fingerprint
from luthier.models.native_model import Fit, finish, hollow, match, native_tensors, put
from luthier.models.protocols import CausalLM
from luthier.models.quantization import Quantisation, QuantLinear, quantise
from luthier.types import Say

FORMAT = 1
_GROUP = 256_000_000  # bytes a cache file
_ROWS = 8192  # of the head widened at a time


@dataclass(frozen=True, slots=True)
class FourOrEight:
    """How to load: what frozen linears become, the type they compute in, whether the result is kept on disk."""

    how: Quantisation
    compute: torch.dtype
    cache: bool = True


def load_quantised(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    config: PretrainedConfig,
    wanted: FourOrEight,
    say: Say = lambda _: None,
) -> CausalLM:
    """The model with every linear layer of its decoder quantised, the rest in ``dtype``. Raises ModelError."""
    shards = Shards.open(path)
    model = hollow(config, dtype)
    fit = match(shards.shapes, family_of(path).rules(config), model)
    weights = _swap(model, wanted)
    aside, head = _untied_embedding(model), _untied_head(model)
    kept = cache_dir(path, config, wanted, dtype) if wanted.cache else None
    tensors: Iterator[tuple[str, Tensor]]
    if kept and kept.is_dir():
        say(f"base: taken from {kept}, quantised before")
        source = Shards.open(kept)
        tensors = ((n, source.read(n)) for n in source.in_file_order() if n != aside)
    else:
        tensors = _quantised(
            native_tensors(shards, fit, dtype, [n for n in (aside, head) if n]), weights, wanted.how, say
        )
        tensors = _kept(tensors, kept, say) if kept else tensors
    passed = 0
    for name, tensor in tensors:
        if name != aside:
            put(model, name, tensor.to(device))
        passed += tensor.numel() * tensor.element_size()
        if passed > _GROUP:
            trim_freed_memory()
            passed = 0
    if head:
        model.set_output_embeddings(NarrowHead.of(model.get_output_embeddings(), dtype))
    if aside:
        place = _rows_on_disk(aside, kept, shards, fit)
        if place:
            model.set_input_embeddings(RowEmbedding(place, dtype, device))
        else:  # a pickle file, and no copy was kept
            rule = next(r for r in fit.rules.values() if aside in r.parts)
            put(model, aside, dict(rule.split(shards.read(rule.source), dtype))[aside].to(device))
    trim_freed_memory()  # 16-bit tensors passed through every worker's heap
    return finish(model, path, fit, device)


def _swap(model: CausalLM, wanted: FourOrEight) -> set[str]:
    """Put an empty ``QuantLinear`` in place of every linear layer of the decoder; returns their weights' names."""
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()}
    for name, module in linear.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantLinear(module, wanted.how, wanted.compute))
    return {f"{name}.weight" for name in linear}


def _quantised(
    tensors: Iterator[tuple[str, Tensor]], weights: set[str], how: Quantisation, say: Say
) -> Iterator[tuple[str, Tensor]]:
    """Weights of linear layers replaced by their parts, quantised on every core, in order."""
    workers = max(1, min(4, os.cpu_count() or 1))
    done, told = 0, 0
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[str, Any]] = deque()

        def next_parts() -> Iterator[tuple[str, Tensor]]:
            name, job = pending.popleft()
            if isinstance(job, Tensor):
                yield name, job
                return
            yield from ((f"{name.removesuffix('weight')}{part}", t) for part, t in job.result().items())

        say(f"base: quantising {len(weights)} linear layers to {how.kind}")
        for name, tensor in tensors:
            pending.append((name, pool.submit(quantise, tensor, how) if name in weights else tensor))
            done += name in weights
            if done * 10 // max(1, len(weights)) > told:
                told = done * 10 // len(weights)
                say(f"base: {done} of {len(weights)} layers quantised")
            if len(pending) > workers:
                yield from next_parts()
        while pending:
            yield from next_parts()


# --- the copy on disk -----------------------------------------------------------------------------------------------


def cache_dir(path: Path, config: PretrainedConfig, wanted: FourOrEight, dtype: torch.dtype) -> Path:
    """Where this base is kept in this form: named by its files' sizes, tensor headers and sampled values."""
    shards = Shards.open(path)
    facts = {
        "format": FORMAT,
        "weights": fingerprint(path, config).weights,
        "files": [[f.name, f.stat().st_size] for f in shards.files],
        "kind": wanted.how.kind,
        "double": wanted.how.double,
        "dtype": str(dtype),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return files.cache_root() / "quantised" / digest[:20]


def _kept(tensors: Iterator[tuple[str, Tensor]], to: Path, say: Say) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on and write them beside; a disk that has no room costs the copy, not the run."""
    writer = _Writer(to, say)
    try:
        for name, tensor in tensors:
            writer.add(name, tensor)
            yield name, tensor
        writer.finish()
    finally:
        writer.close()


class _Writer:
    """Groups of tensors as safetensors files in a directory that appears when it is whole."""

    def __init__(self, to: Path, say: Say) -> None:
        self._say, self._to = say, to
        self._stack = ExitStack()
        self._held: dict[str, Tensor] = {}
        self._where: dict[str, str] = {}
        self._folder: Path | None = None
        with self._or_give_up():
            self._folder = self._stack.enter_context(files.new_dir(to))

    def add(self, name: str, tensor: Tensor) -> None:
        if self._folder is None:
            return
        self._held[name] = tensor.cpu().contiguous()
        if sum(t.numel() * t.element_size() for t in self._held.values()) > _GROUP:
            self._flush()

    def finish(self) -> None:
        self._flush()
        if self._folder is not None:
            with self._or_give_up():
                index = {"metadata": {}, "weight_map": self._where}
                files.write_json(self._folder / "model.safetensors.index.json", index)
                self._stack.close()
                self._say(f"base: kept in {self._to} for the next start")

    def close(self) -> None:
        """Without ``finish`` before it, nothing stays."""
        self._held.clear()
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        if self._folder is None or not self._held:
            return
        file = f"part-{len(set(self._where.values())):05d}.safetensors"
        with self._or_give_up():
            write_safetensors(self._folder / file, self._held)
        self._where.update(dict.fromkeys(self._held, file))
        self._held.clear()

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """A disk that has no room costs the copy, not the run."""
        try:
            yield
        except (OSError, UserError) as e:
            reason = e.message if isinstance(e, UserError) else str(e)
            self._say(f"note: the quantised base is not kept on disk ({' '.join(reason.split())[:200]})")
            self.close()
            self._folder = None


# --- embedding and head ---------------------------------------------------------------------------------------------


class RowEmbedding(nn.Module):
    """A frozen embedding that reads the rows it is asked for from a file: ids [...] -> [..., width]."""

    def __init__(self, place: Place, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.place, self.dtype, self.device = place, dtype, device
        self.num_embeddings, self.embedding_dim = place.shape

    def forward(self, ids: Tensor) -> Tensor:
        wanted, where = torch.unique(ids, return_inverse=True)
        rows = torch.cat([self.place.read(i, 1) for i in wanted.tolist()]).to(self.device, self.dtype)
        return rows[where]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, from {self.place.path.name}"


class NarrowHead(nn.Module):
    """A frozen head kept in 16 bits under a wider model, widened block by block: x [..., in] -> [..., vocab]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @staticmethod
    def of(head: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """The head itself where its type is the model's."""
        return head if head.weight.dtype is dtype or head.bias is not None else NarrowHead(head.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Widened.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Widened(torch.autograd.Function):
    """x @ W.T with W in fp32 a few thousand rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.cat([x @ block.to(x.dtype).T for block in torch.split(weight, _ROWS)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks = zip(torch.split(grad, _ROWS, dim=-1), torch.split(ctx.weight, _ROWS), strict=True)
        found: Tensor = sum(g @ w.to(g.dtype) for g, w in blocks)  # type: ignore[assignment]
        return found, None


def _untied_head(model: CausalLM) -> str | None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(model, "all_tied_weights_keys", None):
        return None
    return next(f"{n}.weight" for n, m in model.named_modules() if m is head)


def _untied_embedding(model: CausalLM) -> str | None:
    """The name of the embedding's weight where it can stay on disk: untied, of the plain kind."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or getattr(model, "all_tied_weights_keys", None):
        return None
    return next(f"{n}.weight" for n, m in model.named_modules() if m is embedding)


def _rows_on_disk(name: str, kept: Path | None, shards: Shards, fit: Fit) -> Place | None:
    """Where its rows lie: in the copy on disk, else in the checkpoint."""
    if kept and kept.is_dir():
        return Shards.open(kept).place(name)
    rule = next(r for r in fit.rules.values() if name in r.parts)
    return shards.place(rule.source) if rule.parts == (name,) else None
