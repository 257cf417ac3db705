"""Estimate the memory of a run, part by part, from its configuration and row lengths; no weights are read.

Fixed parts follow from shapes. Activations are measured: one micro-batch runs forward on the meta device, where tensors
have shapes but no values, and every tensor that autograd saves for the backward pass is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from luthier.batching.collate import SHORTEST_SHARED, collate, to_device
from luthier.batching.plan import Packing, Plan
from luthier.compiled.group import PAD
from luthier.compiled.model import LOGITS, input_projections, unsuitable
from luthier.config import LoraConfig, TrainConfig
from luthier.devices.device import resident_now
from luthier.encoding.store import ExampleStore
from luthier.kernels import native
from luthier.lora.layers import LoraLinear, Targets, attach, trainable_parameters
from luthier.models.directory import cache_bytes, rotary_limit
from luthier.models.native_model import PIECE, empty_model, is_linear
from luthier.models.protocols import CausalLM
from luthier.models.quantization import Quantisation
from luthier.training.forward import checkpointing, loss_sum, segment_attention
from luthier.types import Example, RowRef

_BATCHES = 20_000  # micro-batches searched for the largest
_OPTIMIZER_BYTES = {"adamw_torch": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2.1}  # per trainable parameter
_ALLOCATOR = 70e6  # measured: memory that the allocator retains between calls of the compiled layers, packed operands
_RUNTIME = 120e6  # allowance of a training for thread pools, packing buffers of torch's kernels and the allocator
_NOT_IN_TRAINING = ("on_disk", "largest_on_load", "chat")


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens and supervised tokens of each example, [n] each.

    common: length of the prefix that all examples share. shared: first tokens that each example shares with the one
    before it of the same row, -1 for the first of a row, [n]; None if every row has one example.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    common: int = 0
    shared: Sequence[int] | None = None

    def rows(self) -> list[range]:
        """Return the examples of each row."""
        shared = self.shared or [-1] * len(self.lengths)
        starts = [*(i for i, size in enumerate(shared) if size < 0), len(shared)]
        return [range(a, b) for a, b in pairwise(starts)]

    def own(self, share: bool) -> NDArray[np.int64]:
        """Return the tokens of each example without those that it shares, if shared prefixes are computed once."""
        lengths = np.asarray(self.lengths, np.int64)
        if not share:
            return lengths
        within = np.asarray(self.shared) if self.shared else np.full(len(lengths), -1)
        return lengths - np.where(within >= 0, np.where(within >= SHORTEST_SHARED, within, 0), self.common)

    @classmethod
    def of(cls, examples: ExampleStore) -> RowLengths:
        """Return the lengths of encoded rows."""
        return cls(examples.lengths(), examples.supervised(), examples.common(), examples.shared())

    @classmethod
    def of_length(cls, length: int, rows: int = 1) -> RowLengths:
        """Assume rows of the maximum length, half of it supervised, if there are no rows to count."""
        return cls([length] * rows, [length // 2] * rows)


@dataclass(frozen=True, slots=True)
class Precision:
    """How the base model is stored and in which dtype it computes."""

    name: str
    dtype: torch.dtype
    quantisation: Quantisation | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a training process by part, in bytes. ``training`` and ``load`` sum what is needed at those times.

    on_disk: of the embedding, which is read row by row. chat: peak of another process, a conversation with the trained
    model, as long as the longest row.
    """

    base: float
    embedding_and_head: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    library: float
    on_disk: float
    largest_on_load: float
    chat: float

    @property
    def training(self) -> float:
        """Peak resident memory while training, in bytes."""
        return float(sum(getattr(self, f.name) for f in fields(self) if f.name not in _NOT_IN_TRAINING))

    @property
    def load(self) -> float:
        """Peak resident memory while loading, in bytes."""
        return self.library + self.base + self.embedding_and_head + self.largest_on_load

    @property
    def peak(self) -> float:
        """Peak resident memory of the run, in bytes."""
        return max(self.training, self.load)

    def as_dict(self) -> dict[str, int]:
        parts = {f"{f.name}_bytes": int(getattr(self, f.name)) for f in fields(self)}
        return {
            **parts,
            "load_bytes": int(self.load),
            "training_bytes": int(self.training),
            "peak_bytes": int(self.peak),
        }


def estimate(
    config: PretrainedConfig,
    targets: Targets,
    lora: LoraConfig,
    train: TrainConfig,
    rows: RowLengths,
    precision: Precision,
    recompute: bool,
    kernel: str = "auto",
    resident: float | None = None,
) -> Memory:
    """Estimate the memory of one run. recompute: whether gradient checkpointing is on.

    resident: bytes of a process before it loads a model; None: of this one, now.
    """
    kernel = "looped" if kernel == "varlen" else kernel  # saves as much, and runs on the meta device
    model = empty_model(config).to(precision.dtype)
    wide = precision.dtype.itemsize
    how, weights = precision.quantisation, _Weights.of(model, precision.quantisation)
    layers = attach(model, lora, targets, seed=0)
    trainable = trainable_parameters(layers)
    heaviest = _heaviest(rows, train, rotary_limit(config))
    supervised, vocabulary = sum(e.supervised for e in heaviest), model.get_input_embeddings().weight.shape[0]
    resident = resident_now() if resident is None else resident
    compiled = bool(train.fused) and kernel == "auto" and is_compiled(model, layers, precision.dtype)
    if compiled:
        tokens = len(collate(heaviest, train.shared_prefix).input_ids)
        activations = compiled_activations(model, tokens, recompute, wide)
        logits = compiled_logits(vocabulary, supervised, wide)
    else:
        try:
            activations = _saved(model, heaviest, recompute, kernel, train.shared_prefix)
        except RuntimeError:
            if model.dtype is torch.bfloat16:
                raise
            # the meta device supports the products of experts in bfloat16 only; the number of elements is the same
            activations = _saved(model.to(torch.bfloat16), heaviest, recompute, kernel, train.shared_prefix) * wide / 2
        logits = float(supervised * vocabulary * (8 + wide))
    chat_wide = 4 if how else wide  # over a quantised base, chat computes in fp32 on a CPU
    return Memory(
        base=weights.base(wide),
        embedding_and_head=weights.ends(wide),
        adapter=4 * trainable,
        gradients=4 * trainable,
        optimizer=_OPTIMIZER_BYTES[train.optim] * trainable,
        activations=activations,
        logits=logits,
        workspace=weights.workspace(wide) + (_ALLOCATOR if compiled else 0),
        library=resident + _RUNTIME,
        on_disk=2 * weights.embedding if weights.narrow else 0,
        largest_on_load=weights.on_load(wide),
        chat=resident
        + weights.base(chat_wide)
        + weights.ends(chat_wide)
        + 2 * 4 * trainable  # the second copy is laid out for decoding
        + max(rows.lengths, default=0) * cache_bytes(config, chat_wide),
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """The sizes of a base model. wide: bytes per element that is not quantised.

    linear: (outputs, inputs) of every linear layer. head: elements of one with its own weight, otherwise 0. embedding,
    others: elements.
    """

    how: Quantisation | None
    linear: list[tuple[int, int]]
    embedding: int
    head: int
    others: int

    @classmethod
    def of(cls, model: CausalLM, how: Quantisation | None) -> _Weights:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        layers = [m for m in model.modules() if is_linear(m) and isinstance(m, nn.Linear) and m is not head]
        own = 0 if head is None or head.weight is embedding.weight else head.weight.numel()
        inside, ends = sum(m.weight.numel() for m in layers), embedding.weight.numel() + own
        others = sum(p.numel() for p in model.parameters()) - inside - ends
        return cls(how, [(m.out_features, m.in_features) for m in layers], embedding.weight.numel(), own, others)

    @property
    def narrow(self) -> bool:
        """Whether the head stays in 16 bits and the embedding on disk."""
        return bool(self.how and self.head)

    @property
    def largest(self) -> int:
        """Elements of the largest linear layer."""
        return max(n * k for n, k in self.linear)

    def base(self, wide: int) -> float:
        """Bytes of everything but embedding and head."""
        how = self.how
        return sum(how.bytes_of(n, k) if how else wide * n * k for n, k in self.linear) + wide * self.others

    def ends(self, wide: int) -> float:
        """Bytes of embedding and head."""
        return 2 * self.head if self.narrow else wide * (self.embedding + self.head)

    def workspace(self, wide: int) -> float:
        """Bytes of weights that are dequantised for a product."""
        if not self.how:
            return 0
        return self.largest * wide + (4 * min(PIECE, self.head) if wide == 4 else 0)

    def on_load(self, wide: int) -> float:
        """Peak bytes of tensors in conversion: as read and as converted, two at a time if quantised."""
        if self.how is None:
            return 2 * self.embedding  # at most: tensors that are split or normalised are first read as stored
        embedding = self.embedding * (2 if self.head else 2 + wide)  # only one without a head of its own is converted
        return max(2 * self.largest * (2 * wide + 1), embedding)


def _heaviest(rows: RowLengths, train: TrainConfig, limit: int | None = None) -> list[Example]:
    """Build the micro-batch with the most computed tokens among those of the run's own plan."""
    examples_of = rows.rows()
    plan, packing = Plan.of(len(examples_of), train), Packing.of(train, limit)
    common = rows.common if packing.share else 0
    own = rows.own(packing.share)
    seen, best, most = 0, [0], -1
    for step in range(plan.steps):
        cut = [[e for row in part for e in examples_of[row]] for part in plan.step(step)]
        for micro in [[i for part in cut for i in part]] if packing.tokens else cut:
            tokens = int(own[micro].sum())
            seen += 1
            if tokens > most:
                most, best = tokens, micro
        if seen > _BATCHES:
            break
    examples: list[Example] = []
    for i in best:
        row = _synthetic_row(int(rows.lengths[i]), int(rows.supervised[i]), common, i + 1)
        shared = rows.shared[i] if rows.shared else -1
        if shared >= 0 and examples and packing.share:
            row.ids[:shared] = examples[-1].ids[:shared]
        examples.append(row)
    return max(packing.group([examples]), key=lambda micro: len(collate(micro, packing.share).input_ids))


def _synthetic_row(length: int, supervised: int, common: int = 0, token: int = 0) -> Example:
    """Make a row of ``length`` tokens: ``common`` zeros, then ``token``; the last ``supervised`` are trained."""
    length = max(2, length)
    trained = np.arange(length) >= length - max(1, min(supervised, length - 1))
    return Example(np.where(np.arange(length) < common, 0, token), trained, RowRef("", 1))


def _saved(model: CausalLM, examples: Sequence[Example], recompute: bool, kernel: str, share: bool = False) -> float:
    """Bytes that autograd saves for backward, without parameters; with ``recompute``, plus one recomputed layer."""
    if recompute:
        saved = _count(model, examples, True, kernel, share)
        whole = _count(model, examples, False, kernel, share)
        layers = int(model.config.get_text_config().num_hidden_layers)
        return saved + (whole - saved) / layers
    return _count(model, examples, False, kernel, share)


def _count(model: CausalLM, examples: Sequence[Example], recompute: bool, kernel: str, share: bool = False) -> float:
    """Bytes saved by the whole model; if all layers are equal, extrapolate from runs with two and with three layers."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", nn.ModuleList())
    if len(layers) < 4 or len({str(layer) for layer in layers}) > 1:
        return _counted(model, examples, recompute, kernel, share)
    saved = []
    try:
        for depth in (2, 3):
            decoder.layers = layers[:depth]
            saved.append(_counted(model, examples, recompute, kernel, share))
    finally:
        decoder.layers = layers
    return saved[0] + (len(layers) - 2) * (saved[1] - saved[0])


def _counted(model: CausalLM, examples: Sequence[Example], recompute: bool, kernel: str, share: bool = False) -> float:
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters:
            saved[key] = tensor  # a reference, so that its address is not reused
        return tensor

    model.train()
    with (
        segment_attention(model, kernel),
        checkpointing(model, recompute),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        loss_sum(model, to_device(collate(examples, share), "meta"))
    return float(sum(t.untyped_storage().nbytes() for t in saved.values()))


def with_micro_batch(train: TrainConfig, rows: int) -> TrainConfig:
    """Return the settings with the same effective batch and micro-batches of ``rows`` rows."""
    whole = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return train.model_copy(
        update={
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": -(-whole // rows),
            "micro_batch_tokens": 0,
        }
    )


def is_compiled(model: CausalLM, layers: Mapping[str, LoraLinear], dtype: torch.dtype) -> bool:
    """Whether this run will use the compiled layers."""
    return native.why_unavailable(dtype) is None and unsuitable(model, layers) is None


def compiled_activations(model: CausalLM, tokens: int, recompute: bool, width: int) -> float:
    """Bytes of the activations at the peak of a micro-batch of ``tokens`` computed tokens.

    width: bytes per element. The last layer is counted for all tokens, though it computes supervised positions only.
    """
    blocks = list(model.get_decoder().layers)
    hidden = int(model.config.hidden_size)
    wide = _sizes(blocks[0])
    layer = hidden * 2 + wide["qkv"] + wide["attended"] + wide["gate_up"]
    passing = wide["gate_up"] + wide["gate_up"] // 2 + 4 * hidden
    layers = hidden * len(blocks) + layer if recompute else layer * len(blocks)
    return float(tokens * width * (layers + passing))


def compiled_logits(vocabulary: int, targets: int, width: int) -> float:
    """Bytes of the logits that exist at the same time in the compiled loss."""
    return float(min(targets, max(1, LOGITS // vocabulary)) * vocabulary * width)


def _sizes(block: Any) -> dict[str, int]:
    """Elements per token of the projections' outputs."""
    qkv, gate_up = input_projections(block)

    def base(module: Any) -> Any:
        return module.base if isinstance(module, LoraLinear) else module

    return {
        "qkv": sum(base(layer).out_features for layer in qkv),
        "attended": base(block.self_attn.o_proj).in_features + PAD,
        "gate_up": sum(base(layer).out_features for layer in gate_up),
    }
