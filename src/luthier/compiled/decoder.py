"""Compute the logits of new tokens with compiled layers: a few tokens of several sequences in one call.

A call reads every weight once, as it is stored: quantised weights are decoded in registers. A token's logits are the
same bits whatever else is in the call and however its sequence was divided into calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.compiled.model import LAYERS, Unsuitable, input_projections, suited, window_of
from luthier.compiled.pages import Pages, Row
from luthier.kernels import native
from luthier.kernels.native import decoding
from luthier.lora.layers import LoraLinear
from luthier.models.directory import context_length, rotary_limit
from luthier.models.protocols import CausalLM
from luthier.models.quantization import QuantLinear, quantised_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

_TABLE = 512  # positions by which the tables of rotary factors grow
_KINDS = {torch.float32: decoding.FLOAT, torch.bfloat16: decoding.BFLOAT}
AdapterLayers = Mapping[str, LoraLinear]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The next tokens of one sequence. row: holds its earlier tokens' keys and values.

    adapter: its index, None for the base model. length: tokens of the sequence that are known; it chooses the rotary
    factors of a model whose factors depend on the length.
    """

    row: Row
    ids: Sequence[int]
    adapter: int | None = None
    length: int = 0


class CompiledDecoder:
    """The compiled forward pass of a model, for decoding. adapters: each by module name, as ``lora.attach`` returns it.

    The weights are read where the model holds them, so the model must not replace them while a decoder is in use.
    Raises Unsuitable.
    """

    def __init__(self, model: CausalLM, adapters: Sequence[AdapterLayers] = ()) -> None:
        decoder = suited(model, {})
        self._dtype = decoder.norm.weight.dtype
        try:
            self._decode = _function(self._dtype)
        except native.Unavailable as e:
            raise Unsuitable(str(e)) from None
        self._model, self._decoder = model, decoder
        self._tensors: list[Tensor] = []  # what the structures point to
        blocks = [_Block(block) for block in decoder.layers]
        shape = blocks[0]
        hidden = int(decoder.norm.weight.shape[0])
        if any(block.sizes() != shape.sizes() or block.sizes() != block.expected(hidden) for block in blocks):
            raise Unsuitable("the layers differ in size")
        self._layers = (decoding.LayerStruct * len(blocks))(*(self._layer(block) for block in blocks))
        self._updates, self._adapters = self._all_updates(blocks, adapters), len(adapters)
        self._page_shape = (len(blocks), 2, shape.kv, shape.dim, decoding.PAGE)
        self._rotary_limit = rotary_limit(model.config)
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}
        head = self._matrix(model.get_output_embeddings())
        self._vocabulary = int(head.n)
        self._structure = decoding.ModelStruct(
            layers=len(blocks),
            hidden=hidden,
            heads=shape.heads,
            kv=shape.kv,
            dim=shape.dim,
            rotary=self._look_up(torch.tensor([0]), long=False)[0].shape[1],
            interleaved=shape.interleaved,
            mlp=shape.inner,
            scale=shape.scale,
            eps=decoder.norm.variance_epsilon,
            layer=self._layers,
            norm=self._floats(decoder.norm.weight),
            head=head,
            updates=self._updates,
            page_bytes=self.page_bytes,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: the keys and values of ``decoding.PAGE`` tokens in all layers."""
        return int(torch.Size(self._page_shape).numel()) * self._dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.page_bytes // decoding.PAGE

    def pages(self, limit: int) -> Pages:
        """Return an empty store of keys and values of at most ``limit`` bytes."""
        return Pages(self.page_bytes, decoding.PAGE, limit)

    @torch.inference_mode()
    def logits(self, pages: Pages, new: Sequence[NewTokens], every: bool = False) -> Float[Tensor, "tokens vocab"]:
        """Compute new tokens of some rows, which must differ; returns the logits of each row's last token, fp32.

        every: of all new tokens, row after row. The rows' lengths grow. Raises OutOfPages before anything is computed.
        """
        pages.reserve([(part.row, len(part.ids)) for part in new])
        ids = torch.tensor([i for part in new for i in part.ids])
        positions = torch.tensor([part.row.length + i for part in new for i in range(len(part.ids))])
        rows = torch.tensor([r for r, part in enumerate(new) for _ in part.ids])
        if any(part.adapter is not None and not 0 <= part.adapter < self._adapters for part in new):
            raise ValueError(f"an adapter's index is not below {self._adapters}")
        adapters = torch.tensor([-1 if part.adapter is None else part.adapter for part in new])[rows]
        lengths = [max(part.length, part.row.length + len(part.ids)) for part in new]
        cos, sin = self._factors(positions, torch.tensor(lengths)[rows])
        table = pages.table([part.row for part in new])
        ends = torch.bincount(rows, minlength=len(new)).cumsum(0) - 1
        output = torch.arange(len(ids)) if every else ends
        embedding: Tensor = self._model.get_input_embeddings()(ids)
        x = embedding.float().contiguous()
        logits = torch.empty(len(output), self._vocabulary)
        step = decoding.StepStruct(
            len(ids), len(output), table.shape[1], x.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
            rows.data_ptr(), adapters.data_ptr(), table.data_ptr(), pages.address, output.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        self._decode(self._structure, step)
        for part in new:
            part.row.length += len(part.ids)
        return logits

    def _factors(
        self, positions: Shaped[Tensor, " tokens"], lengths: Shaped[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, "tokens rotary"], Float[Tensor, "tokens rotary"]]:
        """Return cos and sin of the positions of sequences of these lengths, fp32."""
        limit = self._rotary_limit
        if limit is None or int(lengths.max()) <= limit:
            return self._look_up(positions, long=False)
        long, short = self._look_up(positions, long=True), self._look_up(positions.clamp_max(limit - 1), long=False)
        is_long = (lengths > limit)[:, None]
        cos, sin = (torch.where(is_long, a, b) for a, b in zip(long, short, strict=True))
        return cos, sin

    def _look_up(
        self, positions: Shaped[Tensor, " tokens"], long: bool
    ) -> tuple[Float[Tensor, "tokens rotary"], Float[Tensor, "tokens rotary"]]:
        """Read the factors of positions from a table that grows. long: of sequences beyond the rotary limit."""
        size = int(positions.max()) + 1
        if long not in self._tables or len(self._tables[long][0]) < size:
            count = -(-size // _TABLE) * _TABLE
            count = max(size, min(count, context_length(self._model.config) or count))
            if self._rotary_limit is not None:  # the module chooses the factors by the largest position
                count = max(count, self._rotary_limit + 1) if long else self._rotary_limit
            ids = torch.arange(count)[None]
            cos, sin = self._decoder.rotary_emb(torch.zeros(1, 1, 1), ids)
            self._tables[long] = cos[0].float().contiguous(), sin[0].float().contiguous()
        cos, sin = self._tables[long]
        return cos[positions], sin[positions]

    def _kept(self, tensor: Tensor) -> int:
        """Keep a contiguous tensor on the CPU as long as this object; returns its address."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise Unsuitable("tensors must be contiguous and on the CPU")
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Float[Tensor, " ..."] | None) -> int | None:
        return None if tensor is None else self._kept(tensor.detach().float().contiguous())

    def _layer(self, block: _Block) -> decoding.LayerStruct:
        groups = [self._group(modules) for modules in block.groups]
        return decoding.LayerStruct(
            norm=self._floats(block.norms[0].weight),
            norm2=self._floats(block.norms[1].weight),
            eps=block.norms[0].variance_epsilon,
            eps2=block.norms[1].variance_epsilon,
            window=block.window,
            groups=(decoding.GroupStruct * decoding.GROUPS)(*groups),
        )

    def _group(self, modules: Sequence[nn.Module]) -> decoding.GroupStruct:
        matrices = [self._matrix(m) for m in modules]
        if len({m.kind for m in matrices}) > 1:
            raise Unsuitable("layers that read the same input are stored in different types")
        return decoding.GroupStruct(
            count=len(matrices),
            n=sum(m.n for m in matrices),
            k=matrices[0].k,
            matrices=(decoding.MatrixStruct * decoding.MATRICES)(*matrices),
        )

    def _matrix(self, module: nn.Module) -> decoding.MatrixStruct:
        """Describe a linear layer's weight, without its adapter. Raises Unsuitable."""
        base: Any = getattr(module, "base", module)
        bias = self._floats(getattr(base, "bias", None))
        if not isinstance(base, QuantLinear):
            weight = base.weight.detach()
            if weight.dtype not in _KINDS or weight.stride(1) != 1 or weight.device.type != "cpu":
                raise Unsuitable("weights must be fp32 or bf16")
            self._tensors.append(weight)
            n, k = weight.shape
            return decoding.MatrixStruct(_KINDS[weight.dtype], n, k, weight.stride(0), weight.data_ptr(), bias)
        try:
            matrix, tensors = quantised_matrix(base, bias)
        except native.Unavailable as e:
            raise Unsuitable(str(e)) from None
        self._tensors += tensors
        return matrix

    def _all_updates(
        self, blocks: Sequence[_Block], adapters: Sequence[AdapterLayers]
    ) -> ctypes.Array[decoding.UpdateStruct]:
        names = {id(m): n for n, m in self._model.named_modules()}
        updates = (decoding.UpdateStruct * (len(adapters) * len(blocks) * decoding.GROUPS * decoding.MATRICES))()
        at = 0
        for adapter in adapters:
            for block in blocks:
                for modules in block.groups:
                    for i, module in enumerate(modules):
                        if layer := adapter.get(names[id(module)]):
                            updates[at + i] = self._update(layer)
                    at += decoding.MATRICES
        return updates

    def _update(self, layer: LoraLinear) -> decoding.UpdateStruct:
        a, b = layer.lora_A.detach().float() * layer.scaling, layer.lora_B.detach().float().t()
        return decoding.UpdateStruct(len(a), self._kept(a.contiguous()), self._kept(b.contiguous()))


def _function(dtype: torch.dtype) -> Callable[[decoding.ModelStruct, decoding.StepStruct], None]:
    """Return the compiled forward pass for models of this dtype. Raises Unavailable."""
    native.kernels(dtype)
    library = native.load()
    function = library.decode_f32 if dtype is torch.float32 else library.decode_bf16
    function.restype = None
    function.argtypes = [ctypes.POINTER(decoding.ModelStruct), ctypes.POINTER(decoding.StepStruct)]

    def call(model: decoding.ModelStruct, step: decoding.StepStruct) -> None:
        function(ctypes.byref(model), ctypes.byref(step))

    return call


class _Block:
    """The parts of one of transformers' decoder layers, by their roles."""

    def __init__(self, block: nn.Module) -> None:
        parts: Any = block
        attention, mlp, config = parts.self_attn, parts.mlp, parts.self_attn.config
        qkv, gate_up = input_projections(block)
        self.groups = (qkv, [attention.o_proj], gate_up, [mlp.down_proj])
        self.norms = (parts.input_layernorm, parts.post_attention_layernorm)
        self.heads, self.kv = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self.interleaved = LAYERS[type(block).__name__]
        self.inner = int(getattr(mlp.down_proj, "base", mlp.down_proj).in_features)
        self.window = window_of(block)

    def sizes(self) -> list[tuple[int, int]]:
        """Return output and input width of each group of linear layers; the input width of all its layers is equal."""
        bases: list[list[Any]] = [[getattr(m, "base", m) for m in group] for group in self.groups]
        widths = [{int(b.in_features) for b in group} for group in bases]
        return [
            (sum(int(b.out_features) for b in group), width.pop() if len(width) == 1 else 0)
            for group, width in zip(bases, widths, strict=True)
        ]

    def expected(self, hidden: int) -> list[tuple[int, int]]:
        """Return what ``sizes`` must be."""
        q = self.heads * self.dim
        return [(q + 2 * self.kv * self.dim, hidden), (hidden, q), (2 * self.inner, hidden), (hidden, self.inner)]
