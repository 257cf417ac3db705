"""Load a base model in 4 or 8 bits: quantise each weight after reading it, and save the result on disk for later runs.

    checkpoint --one tensor at a time--> native rows --all cores--> packed parts --> the model
                                                                         `--------> cache directory (safetensors)

Neither the checkpoint nor a shard is ever fully in memory. An untied embedding stays on disk, because a step needs
only a few hundred of its rows. The embedding and the head keep 16 bits.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier._util import files
from luthier.devices.device import trim_freed_memory
from luthier.errors import UserError
from luthier.models.checkpoint_reader import Place, Shards, write_safetensors
from luthier.models.directory import family_of, weights_identity
from luthier.models.native_model import Fit, empty_with_buffers, finish, is_linear, match, native_tensors, put, widened
from luthier.models.protocols import CausalLM
from luthier.models.quantization import Quantisation, QuantLinear, quantise
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

FORMAT = 2
_FILE_BYTES = 256_000_000  # per file of the copy on disk
_TRIM_BYTES = 256_000_000  # loaded between two calls of trim_freed_memory


@dataclass(frozen=True, slots=True)
class QuantisedOptions:
    """Options of a quantised load.

    how:     the storage format of frozen linear layers.
    compute: the dtype that they compute in.
    cache:   whether to save the result on disk.
    """

    how: Quantisation
    compute: torch.dtype
    cache: bool = True


def load_quantised(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    config: PretrainedConfig,
    options: QuantisedOptions,
    log: Log = lambda _: None,
) -> CausalLM:
    """Load a model with every linear layer of its decoder quantised and the rest in ``dtype``. Raises ModelError."""
    shards = Shards.open(path)
    model = empty_with_buffers(config, dtype)
    fit = match(shards.shapes, family_of(path).rules(config), model)
    weights = _replace_linear_layers(model, options)
    embedding, head = _untied_embedding(model), _untied_head(model)
    cached = cache_dir(path, config, options.how) if options.cache else None
    as_stored = {embedding, head} | {f"{w.removesuffix('weight')}{part}" for w in weights for part in options.how.parts}
    tensors: Iterator[tuple[str, Tensor]]
    if cached and files.exists(cached):
        log(f"base: loading the quantised copy from {cached}")
        source = Shards.open(cached)
        names = (n for n in source.in_file_order() if n != embedding)
        tensors = ((n, _mapped_or_read(source, n, None if n in as_stored else dtype)) for n in names)
    else:
        tensors = _quantised(native_tensors(shards, fit), weights, options.how, log)
        tensors = _also_write(tensors, cached, log) if cached else tensors
    loaded_bytes = 0
    for name, tensor in tensors:
        if name != embedding:
            put(model, name, tensor.to(device, None if name in as_stored else dtype))
        loaded_bytes += tensor.numel() * tensor.element_size()
        if loaded_bytes > _TRIM_BYTES:
            trim_freed_memory()
            loaded_bytes = 0
    if head:
        model.set_output_embeddings(NarrowHead.of(model.get_output_embeddings(), dtype))
    if embedding:
        place = _rows_on_disk(embedding, cached, shards, fit)
        if place:
            model.set_input_embeddings(RowEmbedding(place, dtype, device))
        else:  # a pickle file, and no copy was saved
            rule = next(r for r in fit.rules.values() if embedding in r.parts)
            put(model, embedding, dict(rule.read(shards, dtype))[embedding].to(device))
    trim_freed_memory()  # 16-bit tensors were allocated in the heap of every worker thread
    return finish(model, path, fit, device)


def _replace_linear_layers(model: CausalLM, options: QuantisedOptions) -> set[str]:
    """Replace every linear layer of the decoder by an empty ``QuantLinear``; returns the names of their weights."""
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if is_linear(m) and isinstance(m, nn.Linear) and m is not head}
    for name, module in linear.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantLinear(module, options.how, options.compute))
    return {f"{name}.weight" for name in linear}


def _quantised(
    tensors: Iterator[tuple[str, Shaped[Tensor, " ..."]]], weights: set[str], how: Quantisation, log: Log
) -> Iterator[tuple[str, Shaped[Tensor, " ..."]]]:
    """Replace the weights of linear layers by their quantised parts, on several threads, in order."""
    workers = max(1, min(4, os.cpu_count() or 1))
    done, tenths = 0, 0
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[str, Any]] = deque()

        def next_parts() -> Iterator[tuple[str, Tensor]]:
            name, job = pending.popleft()
            if isinstance(job, Tensor):
                yield name, job
                return
            yield from ((f"{name.removesuffix('weight')}{part}", t) for part, t in job.result().items())

        log(f"base: quantising {len(weights)} linear layers to {how.kind}")
        for name, tensor in tensors:
            pending.append((name, pool.submit(quantise, tensor, how) if name in weights else tensor))
            done += name in weights
            if done * 10 // max(1, len(weights)) > tenths:
                tenths = done * 10 // len(weights)
                log(f"base: {done} of {len(weights)} layers quantised")
            if len(pending) > workers:
                yield from next_parts()
        while pending:
            yield from next_parts()


# --- the copy on disk -----------------------------------------------------------------------------------------------


def cache_dir(path: Path, config: PretrainedConfig, how: Quantisation) -> Path:
    """Return the directory of the quantised copy, named by file sizes, tensor headers and sampled values.

    One copy serves every dtype that the model computes in: weights are quantised from their stored values.
    """
    key = files.key_of([FORMAT, weights_identity(path, config), how.kind, how.double])
    return files.cache_root() / "quantised" / key


def _mapped_or_read(source: Shards, name: str, dtype: torch.dtype | None) -> Shaped[Tensor, " ..."]:
    """Map a tensor that needs no conversion to ``dtype`` (None: any).

    Others are read, because mapped pages would stay resident beside the result.
    """
    place = source.place(name)
    return source.mapped(name) if dtype is None or (place and place.dtype is dtype) else source.read(name, dtype)


def _also_write(
    tensors: Iterator[tuple[str, Shaped[Tensor, " ..."]]], to: Path, log: Log
) -> Iterator[tuple[str, Shaped[Tensor, " ..."]]]:
    """Yield the tensors and write them to disk too; if that fails, warn and continue."""
    writer = _Writer(to, log)
    try:
        for name, tensor in tensors:
            writer.add(name, tensor)
            yield name, tensor
        writer.finish()
    finally:
        writer.close()


class _Writer:
    """Write groups of tensors as safetensors files in a directory that appears only when it is complete."""

    def __init__(self, to: Path, log: Log) -> None:
        self._log, self._to = log, to
        self._stack = ExitStack()
        self._pending: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._folder: Path | None = None
        with self._disk_errors_end_the_copy():
            self._folder = self._stack.enter_context(files.new_dir(to))

    def add(self, name: str, tensor: Shaped[Tensor, " ..."]) -> None:
        if self._folder is None:
            return
        self._pending[name] = tensor.cpu().contiguous()
        if sum(t.numel() * t.element_size() for t in self._pending.values()) > _FILE_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        if self._folder is not None:
            with self._disk_errors_end_the_copy():
                index = {"metadata": {}, "weight_map": self._file_of}
                files.write_json(self._folder / "model.safetensors.index.json", index)
                self._stack.close()
                self._log(f"base: saved the quantised copy in {self._to} for later runs")

    def close(self) -> None:
        """Delete everything written unless ``finish`` was called."""
        self._pending.clear()
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        if self._folder is None or not self._pending:
            return
        file = f"part-{len(set(self._file_of.values())):05d}.safetensors"
        # the largest elements first, so that all are aligned when the file is mapped into memory
        aligned = dict(sorted(self._pending.items(), key=lambda item: -item[1].element_size()))
        with self._disk_errors_end_the_copy():
            write_safetensors(self._folder / file, aligned)
        self._file_of.update(dict.fromkeys(self._pending, file))
        self._pending.clear()

    @contextmanager
    def _disk_errors_end_the_copy(self) -> Iterator[None]:
        """If writing fails, for example because the disk is full, warn, delete the copy and continue without it."""
        try:
            yield
        except (OSError, UserError) as e:
            reason = e.message if isinstance(e, UserError) else str(e)
            if files.can_cache(self._log):
                self._log(f"note: the quantised copy of the base cannot be saved ({' '.join(reason.split())[:200]})")
            self.close()
            self._folder = None


# --- embedding and head ---------------------------------------------------------------------------------------------


class RowEmbedding(nn.Module):
    """A frozen embedding that reads only the requested rows from a file: ids [...] -> [..., width]."""

    def __init__(self, place: Place, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.place, self.dtype, self.device = place, dtype, device
        self.num_embeddings, self.embedding_dim = place.shape

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        rows = torch.cat([self.place.read(i, 1) for i in distinct.tolist()]).to(self.device, self.dtype)
        return rows[inverse]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, from {self.place.path.name}"


class NarrowHead(nn.Module):
    """A frozen 16-bit head of a model in fp32, widened block by block: x [..., in] -> [..., vocab]."""

    def __init__(self, weight: Float[Tensor, "vocab hidden"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @staticmethod
    def of(head: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """Wrap ``head``, or return it unchanged if it has a bias or already has the model's dtype."""
        return head if head.weight.dtype is dtype or head.bias is not None else NarrowHead(head.weight.data)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        return widened(x, lambda: self.weight)


def _untied_head(model: CausalLM) -> str | None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(model, "all_tied_weights_keys", None):
        return None
    return next(f"{n}.weight" for n, m in model.named_modules() if m is head)


def _untied_embedding(model: CausalLM) -> str | None:
    """Return the name of the embedding weight if it can stay on disk (untied, a plain ``nn.Embedding``), else None."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or getattr(model, "all_tied_weights_keys", None):
        return None
    return next(f"{n}.weight" for n, m in model.named_modules() if m is embedding)


def _rows_on_disk(name: str, cached: Path | None, shards: Shards, fit: Fit) -> Place | None:
    """Locate the rows of a tensor: in the quantised copy, otherwise in the checkpoint; None in a pickle file."""
    if cached and files.exists(cached):
        return Shards.open(cached).place(name)
    rule = next(r for r in fit.rules.values() if name in r.parts)
    return shards.place(rule.source) if rule.parts == (name,) else None
